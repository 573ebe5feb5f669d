//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package main

import (
	"errors"
	"os"
)

// lockFile always fails: there is no spool where its promises were not tested, and -spool-dir ends the relay with exit
// code 1.
func lockFile(*os.File) error { return errors.ErrUnsupported }
