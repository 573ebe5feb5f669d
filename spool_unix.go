//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package main

import (
	"os"
	"syscall"
)

// lockFile takes a lock on f that lasts until it is closed or the process ends, by kill -9 too; an error at once if
// another process has it. It is one of flock(2), which belongs to f alone: one of fcntl(2) would be lost as soon as the
// process closed any other descriptor of the same file. f must stay reachable, or the garbage collector closes it.
func lockFile(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}
