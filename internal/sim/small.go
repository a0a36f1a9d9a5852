package sim

import (
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/sim/simfs"
)

// Letters are the operations of short sequences, on a disk of three blocks.
//
//	w  write the end of block 0          k  kill the primary, and start it
//	o  write over it, into block 1       p  cut its power, and start it
//	f  flush                             r  restart it cleanly
//	u  FUA write of block 2              K  kill the replica, and start it
//	z  zero block 1                      P  cut its power, and start it
//	t  trim block 0                      g  block 0 is a gap
//	x  write block 0, and the log misses it
//	F  a flush that fails
//	c  cut; the line is down
//	b  cut, and ship; the line breaks before the point is listed
//	s  cut, ship and list; the acknowledgement is lost
//	a  cut, ship, list and acknowledge
//
// These are for longer sequences alone:
//
//	B  so much is written to block 1 that the log has a segment more
//	A  a write whose append takes long, and another one; then the primary is killed
const Letters = "wofuztxFcbsakprKPgD"

// short plays a sequence of letters, and then looks whether all comes to rest.
func short(t *testing.T, sequence string, keys *keys) (out Stats, trace []string, wrong error) {
	synctest.Test(t, func(t *testing.T) {
		const block = 64 << 10
		w := newWorld(t, 1, keys, diskSpec{3 * block, blockdev.Info{BlockSize: 512, CheapTrim: true, CheapZero: true}})
		w.plain, w.quota = true, 20<<20
		defer func() {
			w.close()
			w.stats.Histories = 1
			out, trace, wrong = w.stats, w.trace, w.err
		}()
		w.startReplica(0)
		w.startPrimary(0)
		for _, l := range sequence {
			w.note("%c", l)
			w.letter(l)
			time.Sleep(time.Millisecond)
			w.checkSynced()
			w.count(func(s *Stats) { s.Steps++ })
		}
		if !w.failed() {
			w.finish()
		}
	})
	return out, trace, wrong
}

func (w *world) letter(l rune) {
	const block = 64 << 10
	ask := func(op blockdev.Op, flags blockdev.Flags, off, n int64) {
		r := &blockdev.Request{Op: op, Flags: flags, Off: off, Len: n}
		if op == blockdev.OpWrite {
			r.Buf = make([]byte, n)
		}
		w.ask(w.pri, 0, []*blockdev.Request{r})
	}
	soon := func() { _, _ = w.sync(time.Second / 2) } // before the next attempt
	switch l {
	case 'w':
		ask(blockdev.OpWrite, 0, block-8192, 8192)
	case 'o':
		ask(blockdev.OpWrite, 0, block-4096, 8192)
	case 'f':
		ask(blockdev.OpFlush, 0, 0, 0)
	case 'u':
		ask(blockdev.OpWrite, blockdev.FlagFUA, 2*block, 4096)
	case 'z':
		ask(blockdev.OpWriteZeroes, 0, block, block)
	case 't':
		ask(blockdev.OpTrim, 0, 0, block)
	case 'F':
		w.mu.Lock()
		w.badDisk, w.badSync = true, true
		w.mu.Unlock()
		w.pri.proc.Inject(simfs.Fault{Ops: []simfs.Op{simfs.OpSync}, Under: image(0), Times: 1, Err: syscall.EIO})
		ask(blockdev.OpFlush, 0, 0, 0)
		w.pri.proc.Heal()
	case 'x':
		w.pri.proc.Inject(simfs.Fault{Ops: []simfs.Op{simfs.OpWrite}, Under: logDir, Times: 1, Err: syscall.EIO})
		ask(blockdev.OpWrite, 0, 4096, 4096)
		w.pri.proc.Heal()
		time.Sleep(1100 * time.Millisecond) // for a second the log is refused
	case 'g':
		w.pri.vm.Disks()[0].AddGap(0, block)
	case 'c':
		w.line.set(true, false)
		soon()
		w.line.heal()
	case 'b', 's':
		w.setCutAt(map[rune]int{'b': cutBeforeList, 's': cutAfterList}[l])
		soon()
		w.setCutAt(cutNowhere)
	case 'a':
		_, _ = w.sync(time.Minute)
	case 'k', 'p':
		w.crashPrimary(l == 'p')
		w.startPrimary(0)
	case 'r':
		w.stopPrimary()
		w.startPrimary(0)
	case 'B':
		for range 40 {
			ask(blockdev.OpWrite, 0, block, 2*block)
		}
	case 'A':
		before, _ := w.pri.vm.Disks()[0].GapBytes()
		w.late.Store(true)
		for _, off := range []int64{0, 2 * block} {
			w.goAsk(0, &blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: 4096, Buf: make([]byte, 4096)})
			time.Sleep(time.Millisecond)
		}
		w.crashPrimary(false)
		w.startPrimary(0)
		// Nothing is torn but what was not answered: a log with a hole in it would be
		// noticed, and cost a comparison.
		if after, _ := w.pri.vm.Disks()[0].GapBytes(); after > before {
			w.wrong("a kill among appends made gaps of %d bytes", after-before)
		}
	case 'D':
		if v := w.replicaVM(); v != nil {
			_ = v.Discard(nil)
		}
	case 'K', 'P':
		w.crashReplica(l == 'P')
		w.startReplica(0)
	}
}

// sequences calls play with all sequences of n letters, until it returns false.
func sequences(n int, play func(string) bool) {
	index := make([]int, n)
	for {
		var s strings.Builder
		for _, k := range index {
			s.WriteByte(Letters[k])
		}
		if !play(s.String()) {
			return
		}
		k := n - 1
		for ; k >= 0; k-- {
			if index[k]++; index[k] < len(Letters) {
				break
			}
			index[k] = 0
		}
		if k < 0 {
			return
		}
	}
}
