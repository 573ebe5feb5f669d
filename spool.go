package main

// Profiles on disk until their upstream takes them: one folder for each upstream, one file for each profile.
//
// A file is written under a temporary name, synced, renamed, and the folder synced: then it outlives a crash of the
// relay or of the host, and its client may be told so. It is removed once its upstream has accepted it, which makes
// delivery "at least once". In memory a profile that waits is its file's name and size, never its body.
//
// What happens to files is decided in a queue of which this file's spool type is the one owner; what an upstream's
// answer means is the recipient's business. No credential is written: see secret.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// spoolWriters is how many files are written at once for one upstream: each keeps a thread waiting for the disk. Who
// comes when all are at work waits in add, for as long as his client does.
const spoolWriters = 32

// How replay goes about it. An upstream that just came back gets one file at a time, in order, and one more at the same
// time for every replayStep it accepted, up to replayWidth: a backlog let go all at once could bring it down again.
// replayBytes is what the files under way may hold in memory, outside -max-inflight-bytes, in bytes; a larger one goes
// alone.
const (
	replayStep  = 128
	replayWidth = 16
	replayBytes = 16 << 20
)

// poisonAnswers is how often an upstream that takes other profiles may answer one with its own failure before that one
// is set aside: many, because what it answers so may also be a failure of its own that passes.
const poisonAnswers = 10

// busyAnswers is how often an upstream may be too busy for a profile before another one shows whether it is so for all:
// Pyroscope answers 429 to one tenant's, and to what is too large for it. Until then they are kept in order.
const busyAnswers = 3

// asideShare is the part of -spool-max-bytes that rejected/ may take, as a divisor. It comes on top of that limit,
// which counts the files that wait: what was given up does not keep new profiles out.
const asideShare = 10

// Names in the spool directory. No upstream's folder begins with a dot.
const (
	lockName   = ".lock"    // never written to; see spoolDir.lock
	asideName  = "rejected" // in each upstream's folder
	tempPrefix = ".tmp-"    // not yet renamed: no client was told that it is stored
	fileSuffix = ".profile"
)

// spoolMagic begins every file; the SHA-256 of all that follows the first line ends that line. The 1 is the version of
// the format: a file of any other is damaged to this program. The checksum has no key: it finds damage, not forgery.
// A file has no escapes, so that a person can take it apart with a shell:
//
//	pyroscope-relay spool 1 sha256 f3b8baafc546fccb4041ff43afb6f8d6ff8cbb3364bcb1975e2ba8515e695ae5
//	POST /ingest?name=app
//	Content-Type: multipart/form-data; boundary=x
//	X-Scope-Orgid: team
//
//	the body, byte for byte
const spoolMagic = "pyroscope-relay spool 1 sha256 "

// firstLine is the length of that line with its newline, in bytes.
const firstLine = len(spoolMagic) + 2*sha256.Size + 1

// maxFolder is the longest name of a directory on common file systems, in bytes. An upstream whose folder would have a
// longer one is a fault in the configuration.
const maxFolder = 255

// errSpoolFull is a spool that may not or cannot hold another profile. A disk that is full has its own error: see
// isFull.
var errSpoolFull = errors.New("the spool is full (-spool-max-bytes)")

// errDamaged is a file that is not as it was written.
var errDamaged = errors.New("the file is damaged")

// secret tells whether a header may hold a credential: such a one is not written, and the profile goes upstream without
// it when it is replayed. Only -forward-header lets these in at all. One of the words anywhere in the name is enough:
// better a header too few upstream than a credential on disk.
func secret(name string) bool {
	name = strings.ToLower(name)
	return slices.ContainsFunc([]string{"auth", "cookie", "token", "secret", "passw", "key", "credential", "session", "jwt", "signature"},
		func(word string) bool { return strings.Contains(name, word) })
}

// spoolHead is a file up to its body: the checksum, the request line, the headers by name, and a blank line. Nothing in
// p can hold a line break: net/http refuses them in queries and header values. The client's deadline is not in it, nor
// is what the upstream's own options add. Names are sorted: one payload always makes the same file.
func spoolHead(p *payload) []byte {
	rest := []byte("POST " + p.path())
	if p.query != "" {
		rest = append(rest, "?"+p.query...)
	}
	rest = append(rest, '\n')
	for _, name := range slices.Sorted(maps.Keys(p.header)) {
		for _, value := range p.header[name] {
			if !secret(name) {
				rest = append(rest, name+": "+value+"\n"...)
			}
		}
	}
	rest = append(rest, '\n')
	sum := sha256.New()
	sum.Write(rest)
	sum.Write(p.body)
	return append([]byte(spoolMagic+hex.EncodeToString(sum.Sum(nil))+"\n"), rest...)
}

// parseSpooled reads a file. The payload's body shares data, which must not be changed any more; free does nothing, as
// the garbage collector has the bytes in the end. The payload has no deadline. The error is errDamaged, and no input
// makes it panic. A path that is not of the two routes is damage too: a file does not choose where it goes.
func parseSpooled(data []byte) (*payload, error) {
	if len(data) < firstLine {
		return nil, errDamaged
	}
	sum := sha256.Sum256(data[firstLine:])
	if string(data[:firstLine]) != spoolMagic+hex.EncodeToString(sum[:])+"\n" {
		return nil, errDamaged
	}
	head, body, ok := bytes.Cut(data[firstLine:], []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	target, post := strings.CutPrefix(lines[0], "POST ")
	path, query, _ := strings.Cut(target, "?")
	if !ok || !post || path != ingestPath && path != pushPath {
		return nil, errDamaged
	}
	p := &payload{route: routeIngest, query: query, header: http.Header{}, body: body, free: func() {}}
	if path == pushPath {
		p.route = routePush
	}
	for _, line := range lines[1:] {
		name, value, ok := strings.Cut(line, ": ")
		if !ok || name == "" {
			return nil, errDamaged
		}
		p.header[name] = append(p.header[name], value)
	}
	return p, nil
}

// folderName is the directory of an upstream's spool: its name percent-encoded, leading dots too. So it has no slash,
// is not "." or ".." or lockName, and no two names share one, save where the file system does not regard case.
func folderName(upstream string) string {
	rest := strings.TrimLeft(upstream, ".")
	return strings.Repeat("%2E", len(upstream)-len(rest)) + url.PathEscape(rest)
}

// A disk is one upstream's folder; names may begin with "rejected/". Safe for concurrent use. The tests put one in its
// place that fails at a given step.
type disk interface {
	create(name string) (diskFile, error) // for writing; an error if it is there
	read(name string) ([]byte, error)     // all of it; the caller's to keep
	rename(from, to string) error         // in place of a file that is there
	remove(name string) error
	sync() error // makes what was renamed so far outlive a crash of the host
}

// A diskFile is one that is being written. Once Sync has returned nil its data outlives a crash of the host; its name
// does when disk.sync has, too.
type diskFile interface {
	io.WriteCloser
	Sync() error
}

// A folder is a disk below a directory that nothing it is asked for can leave: os.Root refuses names, and symbolic
// links on the way, that lead out of it.
type folder struct {
	dir  *spoolDir // held with it: whoever can write has the lock
	name string    // see folderName
}

func (d folder) create(name string) (diskFile, error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	f, err := d.dir.root.OpenFile(d.name+"/"+name, flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) && d.make() == nil { // somebody cleared it away
		f, err = d.dir.root.OpenFile(d.name+"/"+name, flags, 0o600)
	}
	if err != nil {
		return nil, err // not f: a nil *os.File is no nil diskFile
	}
	return f, nil
}

func (d folder) read(name string) ([]byte, error) { return d.dir.root.ReadFile(d.name + "/" + name) }

func (d folder) rename(from, to string) error {
	return d.dir.root.Rename(d.name+"/"+from, d.name+"/"+to)
}

func (d folder) remove(name string) error { return d.dir.root.Remove(d.name + "/" + name) }

func (d folder) sync() error { return syncDir(d.dir.root, d.name) }

// make creates the folder, and rejected/ in it, unless they are there. Only the directory above is synced: without
// rejected/ no profile is lost, and the next start makes it again.
func (d folder) make() error {
	for _, name := range []string{d.name, d.name + "/" + asideName} {
		if err := d.dir.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return syncDir(d.dir.root, ".")
}

// syncDir makes the names in a directory outlive a crash of the host: to sync a file does not save the entry that names
// it (fsync(2)).
func syncDir(root *os.Root, name string) error {
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// A spoolDir is -spool-dir, held by this process alone. It has to stay reachable while its spools are in use: an
// os.File that the garbage collector finds is closed, and the lock with it.
type spoolDir struct {
	root *os.Root
	lock *os.File // closing it, or the end of the process in whatever way, lets go
}

// openSpoolDir opens dir and locks it. It creates it if need be; a directory that is there keeps its mode. It does not
// wait for another process that has the lock. After an error nothing stays open.
func openSpoolDir(dir string) (*spoolDir, error) {
	if err := makeSpoolDir(dir); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	lock, err := root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	if err := lockFile(lock); err != nil {
		return nil, errors.Join(fmt.Errorf("%s cannot be locked; another relay may be using it: %w", dir, err), lock.Close(), root.Close())
	}
	return &spoolDir{root, lock}, nil
}

// makeSpoolDir creates dir. The sync of its parents is all that makes it outlive a power cut; one that we may not open
// for that was not created by us.
func makeSpoolDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	at, err := filepath.Abs(dir)
	for err == nil && at != filepath.Dir(at) {
		at = filepath.Dir(at)
		if f, err := os.Open(at); err == nil {
			f.Sync()
			f.Close()
		}
	}
	return err
}

// close gives the directory and its lock up. No spool in it can be used after that.
func (d *spoolDir) close() error { return errors.Join(d.lock.Close(), d.root.Close()) }

// strangers are the folders in the directory that belong to none of these upstreams, by the upstream's name; what is no
// such folder is called what it is called on disk. They may come with an error, and are not all of them then. The log
// names them at start: the backlog of an upstream that got another name would be forgotten.
func (d *spoolDir) strangers(upstreams []string) ([]string, error) {
	var found []string
	err := eachName(d.root, ".", func(name string) {
		if name != lockName && !slices.ContainsFunc(upstreams, func(u string) bool { return folderName(u) == name }) {
			found = append(found, name)
		}
	})
	for i, name := range found {
		if upstream, err := url.PathUnescape(name); err == nil {
			found[i] = upstream
		}
	}
	return found, err
}

// eachName calls f with every name in a directory, in no order. f may remove that name: the others are seen all the
// same (POSIX, readdir).
func eachName(root *os.Root, dir string, f func(name string)) error {
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(1024) // a part at a time: there may be very many
		for _, name := range names {
			f(name)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// open reads what there is for an upstream, and removes what was never finished. Call it once for each. It reads names
// and sizes alone: whether a file is damaged shows when its turn comes. max is in bytes; files beyond it that are there
// are kept. m.spool is not needed before the first add and start.
func (d *spoolDir) open(upstream string, max int64, dropOldest bool, m *endpointMetrics, log *slog.Logger) (*spool, error) {
	s := &spool{
		upstream: upstream, max: max, dropOldest: dropOldest, metrics: m, log: log,
		writers: make(chan struct{}, spoolWriters), wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	at := folder{d, folderName(upstream)}
	s.disk = at
	if err := at.make(); err != nil {
		return nil, err
	}
	if err := s.load(d.root, at.name); err != nil {
		return nil, err
	}
	s.pending.Store(int64(len(s.files)))
	if n := len(s.files); n > 0 {
		s.last = s.files[n-1].id
		log.Info("spool holds profiles from before", "upstream", upstream, "files", n, "bytes", s.bytes)
	}
	return s, nil
}

// load fills the queue with what the folder of that name has. It and loadAside run before anybody else knows s, hence
// without mu. Of the files that are none of ours one is named in the log, however many there are.
func (s *spool) load(base *os.Root, name string) error {
	root, err := base.OpenRoot(name)
	if err != nil {
		return err
	}
	defer root.Close()
	var unknown string
	err = eachName(root, ".", func(name string) {
		switch f, ok := statSpooled(root, name); {
		case ok:
			s.files, s.bytes = append(s.files, f), s.bytes+f.size
		case strings.HasPrefix(name, tempPrefix):
			s.disk.remove(name)
		case name != asideName:
			unknown = name
		}
	})
	if unknown != "" {
		s.log.Warn("spool: a file that the relay did not write is left alone", "upstream", s.upstream, "file", unknown)
	}
	slices.SortFunc(s.files, byID)
	return errors.Join(err, s.loadAside(root))
}

// loadAside finds out how much rejected/ holds, by whatever names. If that is too much, the next setAside makes it
// less.
func (s *spool) loadAside(root *os.Root) error {
	err := eachName(root, asideName, func(name string) {
		if info, err := root.Lstat(asideName + "/" + name); err == nil {
			s.aside, s.asideBytes = append(s.aside, asideFile{asideName + "/" + name, info.Size()}), s.asideBytes+info.Size()
		}
	})
	slices.SortFunc(s.aside, func(a, b asideFile) int { return strings.Compare(a.name, b.name) })
	return err
}

// A spooled is one file that waits. All but its first line is under spool.mu; that line is constant once the file is in
// the queue.
type spooled struct {
	id, size, body int64 // nanoseconds since 1970, unique; bytes of the file, and of the body in it

	busy     bool      // being sent
	tries    int       // failures that may have been its own
	declined int       // times that its upstream was too busy for it
	poison   int       // those that count for poisonAnswers
	proved   bool      // one was its own: another profile was accepted after it
	turned   bool      // the last was a trialBusy
	apart    bool      // one of those was meant for it alone: another profile was accepted after it
	after    time.Time // not to be sent before
}

// name is the name of the file: names sort as their times do, because twenty digits hold every int64.
func (f *spooled) name() string { return fmt.Sprintf("%020d-%d%s", f.id, f.body, fileSuffix) }

// byID puts older files first. No id is negative, so that the difference of two does not overflow.
func byID(a, b *spooled) int { return int(min(1, max(-1, a.id-b.id))) }

// statSpooled is the file of that name; false if it is none of ours: not a regular file, or a name other than the one
// that it would be read and removed by later.
func statSpooled(root *os.Root, name string) (*spooled, bool) {
	id, body, ok := strings.Cut(strings.TrimSuffix(name, fileSuffix), "-")
	f := &spooled{}
	var err1, err2 error
	f.id, err1 = strconv.ParseInt(id, 10, 64)
	f.body, err2 = strconv.ParseInt(body, 10, 64)
	if !ok || err1 != nil || err2 != nil || f.id < 0 || f.name() != name {
		return nil, false
	}
	info, err := root.Lstat(name)
	if err != nil || !info.Mode().IsRegular() {
		return nil, false
	}
	f.size = info.Size()
	return f, true
}

// An asideFile is one in rejected/.
type asideFile struct {
	name string // with rejected/ before it
	size int64  // bytes
}

// A trial is what came of sending one file. What follows from it is decided in judgeLocked.
type trial int

const (
	trialAccepted trial = iota
	trialRefused        // for good
	trialPoison         // the upstream failed over it: the profile may be at fault
	trialDoubtful       // it failed: the profile or the upstream may be at fault
	trialBusy           // it was turned away for now, perhaps for what it is: too large, or a tenant's that has too many
	trialDown           // the upstream is at fault
	trialDamaged        // the file is not as it was written
	trialCut            // the relay is stopping
)

// A recipient is an upstream as its spool sees it.
type recipient interface {
	// retake offers a profile once. The duration is how long the upstream asked to be left alone. It may keep the
	// payload, ends soon after its context, and is called for up to replayWidth profiles at once.
	retake(context.Context, *payload) (trial, time.Duration)
	// patience is how long to wait after failure number n, the first being 0. random, in [0, 1), makes it longer. It is
	// called with spool.mu held and must not call back.
	patience(n int, asked time.Duration, random float64) time.Duration
}

// A spool holds the profiles that one upstream could not take, and hands them over when it can. Safe for concurrent
// use. It is made by spoolDir.open: add may be called from then on, and files are sent from start to stop. The lock is
// never held while a file is read, written or sent.
type spool struct {
	upstream   string // its name, for the log
	disk       disk
	max        int64 // bytes of files, those being written included
	dropOldest bool  // when there is no room: else the new one is turned away
	metrics    *endpointMetrics
	log        *slog.Logger
	trouble    throttle           // of what a person must mend
	asides     throttle           // of what is put into rejected/
	to         recipient          // set by start
	writers    chan struct{}      // a semaphore
	pending    atomic.Int64       // files, and those being written
	failing    atomic.Bool        // the last write failed
	wake       chan struct{}      // replay has something to look at
	done       chan struct{}      // closed when replay has ended
	cut        context.CancelFunc // ends what is under way; set by start

	mu              sync.Mutex  // held when a method is called whose name ends in Locked
	last            int64       // the newest id
	files           []*spooled  // by id
	bytes, reserved int64       // of files, and of those being written; add never takes the sum over max
	aside           []asideFile // those that make room first are first
	asideBytes      int64

	// What replay goes by, under mu as well. While failures is above 0 the upstream counts as down, and pause says when
	// it is asked again. While there is a suspect it is open whether the upstream or that profile is at fault. See
	// judgeLocked.
	stopping  bool
	busy      int        // files being sent
	busyBytes int64      // of these files
	streak    int        // accepted since the upstream was last down
	failures  int        // in a row
	pause     time.Time  // nothing is sent before
	picky     bool       // the upstream turns some away while it takes others: it is not left alone for each of these
	suspect   *spooled   // failed last; whether the upstream is at fault, the next one will show
	failed    []*spooled // all that failed since one was accepted, but for those known for it
	rounds    int        // times that the upstream was found down
}

// waiting tells whether profiles must go through the spool, behind those that are there. It takes no lock while the
// disk works: every request asks. One that is being written is waited for, unless the last one failed: each would lead the next into a
// spool that takes nothing.
func (s *spool) waiting() bool {
	if s.pending.Load() == 0 || !s.failing.Load() {
		return s.pending.Load() > 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.files) > 0
}

// add stores p and returns once it would outlive a crash. It waits for its turn until ctx ends, but for the disk, after
// that, as long as it takes. The error is that of ctx, and nothing was written, or else p is not stored for lack of
// room or a fault of the disk. p is read until add returns and not kept: the caller holds it.
func (s *spool) add(ctx context.Context, p *payload) error {
	// Before the file is there: who comes meanwhile must not overtake it on the straight way to the upstream.
	s.pending.Add(1)
	if err := s.store(ctx, p); err != nil {
		s.pending.Add(-1)
		if err != ctx.Err() {
			s.failing.Store(true)
			s.trouble.log(s.log, slog.LevelError, "spool cannot take a profile", "upstream", s.upstream, "error", err)
		}
		return err
	}
	s.failing.Store(false)
	s.metrics.spool.written.Add(1)
	s.poke()
	return nil
}

// store is add but for what is counted and logged.
func (s *spool) store(ctx context.Context, p *payload) error {
	select {
	case s.writers <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.writers }()
	head := spoolHead(p)
	f, err := s.reserve(int64(len(head)), int64(len(p.body)))
	if err != nil {
		return err
	}
	err = s.write(f, head, p.body)
	if isFull(err) && s.dropOldest && s.makeRoom(f.size) {
		err = s.write(f, head, p.body) // once: if others fill the disk, dropping more is of no use
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved -= f.size
	if err != nil {
		return err
	}
	// Writers overtake each other: the place is nearly always the last.
	i, _ := slices.BinarySearchFunc(s.files, f, byID)
	s.files, s.bytes = slices.Insert(s.files, i, f), s.bytes+f.size
	if first := s.files[0]; len(s.files) == 2 && !first.proved && !first.apart {
		first.after = time.Time{} // while it was alone it waited for itself; f is not to overtake it
	}
	return nil
}

// isFull tells whether a file could not be written for lack of space: that of the file system, be it bytes or inodes
// (ENOSPC), or that of the user's quota (EDQUOT).
func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// reserve makes room for a file of that many bytes and gives it its name. The caller takes its size off reserved again.
// The error is errSpoolFull. A clock that was set back does not put a new file before those that wait.
func (s *spool) reserve(head, body int64) (*spooled, error) {
	f := &spooled{size: head + body, body: body}
	for { // others may take the room that was made, as no lock is held while files are erased
		s.mu.Lock()
		over := s.bytes + s.reserved + f.size - s.max
		if over <= 0 {
			s.last = max(time.Now().UnixNano(), s.last+1)
			f.id = s.last
			s.reserved += f.size
			s.mu.Unlock()
			return f, nil
		}
		s.mu.Unlock()
		if !s.dropOldest || f.size > s.max || !s.makeRoom(over) {
			return nil, errSpoolFull
		}
	}
}

// makeRoom drops the oldest files, at least that many bytes of them if there are so many; false if there are none.
// Those being sent stay: the upstream may just be accepting them. The others are erased before it returns, so that a
// full disk has room.
func (s *spool) makeRoom(bytes int64) bool {
	var dropped []*spooled
	s.mu.Lock()
	for i := 0; i < len(s.files) && bytes > 0; {
		f := s.files[i]
		if f.busy {
			i++
			continue
		}
		s.removeLocked(f)
		bytes -= f.size
		dropped = append(dropped, f)
	}
	s.mu.Unlock()
	for _, f := range dropped {
		s.erase(f)
		s.metrics.dropped(dropSpoolOldest, int(f.body))
		s.trouble.log(s.log, slog.LevelWarn, "spool is full: its oldest profile was dropped", "upstream", s.upstream, "file", f.name())
	}
	return len(dropped) > 0
}

// write puts a file where a crash cannot reach it, or leaves none. The order is the promise: the data is synced before
// it gets its name, or a crash could leave the name on half a file; the folder is synced before anybody is told, or a
// power cut could take the name. If neither the sync of the folder nor the removal after it works, the profile is sent
// after a restart although its client was told that it is not stored.
func (s *spool) write(f *spooled, head, body []byte) error {
	temp := tempPrefix + f.name()
	err := s.fill(temp, head, body)
	if err == nil {
		err = s.disk.rename(temp, f.name())
	}
	if err != nil {
		s.disk.remove(temp)
		return err
	}
	if err := s.disk.sync(); err != nil {
		s.disk.remove(f.name())
		return err
	}
	return nil
}

// fill creates a file of these parts and syncs it. A sync that failed is not tried again: the kernel may have dropped
// what it could not write, and report success the next time. Close can fail as well, on NFS for lack of space
// (close(2)).
func (s *spool) fill(name string, parts ...[]byte) (err error) {
	f, err := s.disk.create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for _, part := range parts {
		if _, err := f.Write(part); err != nil {
			return err
		}
	}
	return f.Sync()
}

// erase removes a file that is done with. One that stays is sent again after a restart, and so is one that a power cut
// brings back: no sync follows, as delivery is "at least once" in any case.
func (s *spool) erase(f *spooled) {
	if err := s.disk.remove(f.name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.trouble.log(s.log, slog.LevelError, "spool: a file cannot be removed", "upstream", s.upstream, "error", err)
	}
}

// poke makes replay look at the queue again. It never waits: one token is enough for any number of changes.
func (s *spool) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// start begins to hand files over to that recipient, until ctx ends or stop. Call it once. The end of ctx cuts short
// what is under way.
func (s *spool) start(ctx context.Context, to recipient) {
	s.to = to
	ctx, cut := context.WithCancel(ctx)
	s.cut = cut
	go s.replay(ctx)
}

// stop sends no more files, and waits for those under way until ctx ends; then it cuts them short. What comes in
// afterwards is stored all the same. Call it after start. Nothing is under way when it returns.
func (s *spool) stop(ctx context.Context) {
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	s.poke()
	select {
	case <-s.done:
	case <-ctx.Done():
	}
	s.cut()
	<-s.done
}

// replay sends files, each on a goroutine of its own, and ends when the last of these has.
func (s *spool) replay(ctx context.Context) {
	defer close(s.done)
	var trying sync.WaitGroup
	defer trying.Wait() // runs before done is closed
	for {
		f, wait, stopping := s.next(time.Now())
		if stopping || ctx.Err() != nil {
			return
		}
		if f != nil {
			trying.Go(func() { s.try(ctx, f) })
			continue
		}
		t := time.NewTimer(wait)
		select {
		case <-s.wake:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// next is the file to send now, or how long to wait for one unless something changes. The file is busy from then on,
// until finish.
func (s *spool) next(now time.Time) (f *spooled, wait time.Duration, stopping bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.pause.Sub(now); d > 0 || s.stopping {
		return nil, d, s.stopping
	}
	wait = math.MaxInt64
	if s.busy >= s.widthLocked() {
		return nil, wait, false
	}
	first := s.firstLocked()
	for i := range s.files {
		f := s.files[(first+i)%len(s.files)]
		if f.busy {
			continue // finish is followed by a poke
		}
		if d := f.after.Sub(now); d > 0 {
			wait = min(wait, d)
			continue
		}
		if s.busy > 0 && s.busyBytes+f.size > replayBytes {
			break // and no look for a smaller one: those would keep a large one waiting for ever
		}
		f.busy = true
		s.busy, s.busyBytes = s.busy+1, s.busyBytes+f.size
		return f, 0, false
	}
	return nil, wait, false
}

// widthLocked is how many files may be under way at once: one while the upstream is down or in doubt.
func (s *spool) widthLocked() int {
	if s.failures > 0 || s.suspect != nil {
		return 1
	}
	return min(replayWidth, 1+s.streak/replayStep)
}

// firstLocked is where to begin to look for a file: at the oldest. After a failure that may be the profile's own fault
// another one shows whether it was, and not always the same other one. A profile that brings its upstream down whenever
// it comes back is not let go first every time: after poisonAnswers failures every other round begins elsewhere.
func (s *spool) firstLocked() int {
	if len(s.files) > 0 && (s.suspect != nil || s.rounds%2 == 1 && s.files[0].tries >= poisonAnswers) {
		return rand.IntN(len(s.files)) // any: its neighbours may be a tenant's that is turned away like it
	}
	return 0
}

// try sends one file and deals with what comes of it. A file that is gone counts as damaged, so that the accounts
// close. One that cannot be read is doubtful, which alone never gets it set aside: it is tried again until the disk
// gives it back.
func (s *spool) try(ctx context.Context, f *spooled) {
	var p *payload
	data, err := s.disk.read(f.name())
	if err == nil {
		p, err = parseSpooled(data)
	}
	t, asked := trialDoubtful, time.Duration(0)
	switch {
	case errors.Is(err, errDamaged) || errors.Is(err, fs.ErrNotExist):
		t = trialDamaged
	case err != nil:
		s.trouble.log(s.log, slog.LevelError, "spool: a file cannot be read", "upstream", s.upstream, "error", err)
	default:
		p.hold() // and no release: the bytes are nobody else's
		t, asked = s.to.retake(ctx, p)
	}
	s.finish(f, t, asked)
	s.poke()
}

// finish books the result of a trial: first on disk, then in the queue. While f is busy nobody else touches its file,
// and its bytes count until it is gone. Poison alone is found out in the queue, and has left it by then.
func (s *spool) finish(f *spooled, t trial, asked time.Duration) {
	switch t {
	case trialAccepted:
		s.erase(f)
		s.metrics.spool.replayed.Add(1)
	case trialRefused:
		s.reject(f)
	case trialDamaged:
		s.setAside(f, ".damaged")
		s.metrics.spool.damaged.Add(1)
		s.metrics.dropped(dropSpoolDamaged, int(f.body))
	}
	s.mu.Lock()
	f.busy = false
	s.busy, s.busyBytes = s.busy-1, s.busyBytes-f.size
	poison := s.judgeLocked(f, t, asked, time.Now())
	s.mu.Unlock()
	if poison {
		s.reject(f)
	}
}

// reject gives a whole file up, for what its upstream said of it.
func (s *spool) reject(f *spooled) {
	s.setAside(f, "")
	s.metrics.spool.rejected.Add(1)
	s.metrics.dropped(dropSpoolRejected, int(f.body))
}

// judgeLocked sorts f back into the queue or out of it, and tells whether it was found to be poison.
//
// When a profile fails, the next one shows whether its upstream was at fault: it is, if that one fails too. Whatever
// failed before another was accepted was at fault itself, and its failures say no more about the upstream. A profile
// that is all alone gets no such test. A refusal is an answer, hence no outage, but proves nothing of other failures.
func (s *spool) judgeLocked(f *spooled, t trial, asked time.Duration, now time.Time) (poison bool) {
	switch t {
	case trialCut:
		return false
	case trialDamaged:
		s.removeLocked(f)
		return false
	case trialRefused:
		s.removeLocked(f)
		s.failures = 0 // it answers
		return false
	case trialAccepted:
		s.removeLocked(f)
		s.acceptedLocked()
		return false
	case trialDown:
		s.restLocked(asked, now)
		return false
	case trialBusy:
		f.declined++
		if f.declined <= busyAnswers && !f.apart && !s.picky && (s.suspect == nil || s.suspect == f) {
			s.restLocked(asked, now) // in an outage all wait, and go in order after it
			return false
		}
	}
	f.after = now.Add(s.to.patience(f.tries+f.declined, asked, 0))
	if f.turned = t == trialBusy; !f.turned {
		f.tries++
	}
	known := f.proved || f.turned && f.apart
	switch {
	case known && s.failures > 0: // in an outage any profile fails
		return false
	case known || s.aloneLocked(f):
		return t == trialPoison && s.countLocked(f)
	}
	if !slices.Contains(s.failed, f) {
		s.failed = append(s.failed, f)
	}
	if s.suspect == nil || s.suspect == f { // the next other one will show
		s.suspect = f
		return false
	}
	if s.picky && len(s.failed) < poisonAnswers {
		return false // they may all be those that are turned away
	}
	for _, g := range s.failed {
		g.after = time.Time{} // an outage: who waited first goes first after it
	}
	s.restLocked(asked, now)
	return false
}

// acceptedLocked notes that the upstream is up, and that what failed before was at fault itself.
func (s *spool) acceptedLocked() {
	for _, f := range s.failed {
		if f.turned {
			f.apart, s.picky = true, true
		} else {
			f.proved = true
		}
	}
	s.failed, s.suspect = nil, nil
	s.failures, s.streak = 0, s.streak+1
}

// aloneLocked tells whether there is no other profile that could show whether f or the upstream is at fault.
func (s *spool) aloneLocked(f *spooled) bool {
	return !slices.ContainsFunc(s.files, func(other *spooled) bool { return other != f && !other.proved })
}

// countLocked counts a failure of f that was its own. After too many of them f is out of the queue, and it says so.
func (s *spool) countLocked(f *spooled) bool {
	f.poison++
	if f.poison < poisonAnswers {
		return false
	}
	s.removeLocked(f)
	return true
}

// restLocked leaves the upstream alone for a while, longer each time until it accepts something. What fails while it
// is being left alone does not count again: up to replayWidth files may be under way when it goes down, and all of them
// fail.
func (s *spool) restLocked(asked time.Duration, now time.Time) {
	s.suspect, s.streak = nil, 0
	if now.Before(s.pause) {
		return
	}
	s.pause = now.Add(s.to.patience(s.failures, asked, rand.Float64()))
	s.failures++
	s.rounds++
}

// rest is for a failure that was seen outside the spool, by a delivery in a client's time: replay does not ask the same
// upstream again at once.
func (s *spool) rest(asked time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.restLocked(asked, time.Now())
}

// removeLocked takes f out of the queue, not off the disk. It is cheap for the oldest ones: what stands before f is
// moved, not what stands behind it.
func (s *spool) removeLocked(f *spooled) {
	i, ok := slices.BinarySearchFunc(s.files, f, byID)
	if !ok {
		return
	}
	copy(s.files[1:i+1], s.files[:i])
	s.files[0] = nil // for the garbage collector: the array stays
	s.files, s.bytes = s.files[1:], s.bytes-f.size
	s.pending.Add(-1)
	if s.suspect == f {
		s.suspect = nil
	}
}

// setAside moves a file out of the queue's way, into rejected/, whose oldest files make room for it. suffix is put
// after its name. One that is larger than all of rejected/ may be is removed. One that cannot be moved stays in the
// folder and is in the queue again after a restart. Like erase it does not sync.
func (s *spool) setAside(f *spooled, suffix string) {
	name := asideName + "/" + f.name() + suffix
	most := s.max / asideShare
	if f.size > most {
		s.asides.log(s.log, slog.LevelWarn, "spool: a profile was given up; rejected/ has no room for it", "upstream", s.upstream, "bytes", f.size)
		s.erase(f)
		return
	}
	if err := s.disk.rename(f.name(), name); err != nil {
		s.trouble.log(s.log, slog.LevelError, "spool: a file cannot be moved", "upstream", s.upstream, "error", err)
		return
	}
	s.asides.log(s.log, slog.LevelWarn, "spool: a profile was set aside", "upstream", s.upstream, "file", name)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aside, s.asideBytes = append(s.aside, asideFile{name, f.size}), s.asideBytes+f.size
	for s.asideBytes > most {
		s.disk.remove(s.aside[0].name)
		s.asideBytes -= s.aside[0].size
		s.aside = s.aside[1:]
	}
}

// status is what the gauges show: files, their bytes, and the age of the oldest one in seconds, 0 if there is none.
// What is being written or in rejected/ is not counted.
func (s *spool) status() (files, bytes int64, oldest float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.files) > 0 {
		oldest = max(0, time.Since(time.Unix(0, s.files[0].id)).Seconds())
	}
	return int64(len(s.files)), s.bytes, oldest
}
