package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"afterimage/blockdev"
)

// The test binary is also the command: called under its name it is main.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"afterimage": main})
}

// TestScripts runs the sessions in testdata/script. Besides testscript's own
// commands they have:
//
//	status N ARG...         run afterimage, whose exit status must be N
//	fill FILE OFF LEN BYTE  write LEN times BYTE at OFF, all numbers
//	resize FILE SIZE        make or truncate a file
//	remember FILE...        note content and metadata of files, or absence
//	unchanged               everything remembered is still so
//	hold FILE               lock the image as another process that writes it would
//	holes FILE N            the file takes less than N bytes of space
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":    scriptStatus,
			"fill":      scriptFill,
			"resize":    scriptResize,
			"remember":  scriptRemember,
			"unchanged": scriptUnchanged,
			"hold":      scriptHold,
			"holes":     scriptHoles,
		},
		Setup: func(env *testscript.Env) error {
			env.Values["remembered"] = map[string]string{}
			env.Setenv("GORACE", os.Getenv("GORACE"))
			env.Setenv("LONG", strings.Repeat("x", 5000))
			return nil
		},
	})
}

func scriptStatus(ts *testscript.TestScript, _ bool, args []string) {
	want := number(ts, args[0])
	err := ts.Exec("afterimage", args[1:]...)
	got := int64(0)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = int64(exit.ExitCode())
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
	if got != 0 && ts.ReadFile("stderr") == "" {
		ts.Fatalf("failed without a word")
	}
}

func scriptFill(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	_, err = f.WriteAt(bytes.Repeat([]byte{byte(number(ts, args[3]))}, int(number(ts, args[2]))), number(ts, args[1]))
	ts.Check(err)
}

func scriptResize(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	ts.Check(err)
	ts.Check(f.Truncate(number(ts, args[1])))
	ts.Check(f.Close())
}

func scriptRemember(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		remembered(ts)[name] = describe(ts, name)
	}
}

func scriptUnchanged(ts *testscript.TestScript, _ bool, _ []string) {
	if len(remembered(ts)) == 0 {
		ts.Fatalf("nothing was remembered")
	}
	for name, was := range remembered(ts) {
		if is := describe(ts, name); is != was {
			ts.Fatalf("%s has changed: it was %s, it is %s", name, was, is)
		}
	}
}

func remembered(ts *testscript.TestScript) map[string]string {
	return ts.Value("remembered").(map[string]string)
}

func describe(ts *testscript.TestScript, name string) string {
	st, err := os.Lstat(ts.MkAbs(name))
	if errors.Is(err, os.ErrNotExist) {
		return "absent"
	}
	ts.Check(err)
	s := fmt.Sprintf("%v, %d bytes, changed %v", st.Mode(), st.Size(), st.ModTime())
	if st.Mode().IsRegular() {
		f, err := os.Open(ts.MkAbs(name))
		ts.Check(err)
		defer f.Close()
		h := sha256.New()
		_, err = io.Copy(h, f)
		ts.Check(err)
		s += fmt.Sprintf(", content %x", h.Sum(nil))
	}
	return s
}

func scriptHold(ts *testscript.TestScript, _ bool, args []string) {
	dev, err := blockdev.OpenFile(ts.MkAbs(args[0]), blockdev.FileOptions{})
	ts.Check(err)
	ts.Defer(func() { dev.Close() })
}

func scriptHoles(ts *testscript.TestScript, _ bool, args []string) {
	var st unix.Stat_t
	ts.Check(unix.Stat(ts.MkAbs(args[0]), &st))
	if n := st.Blocks * 512; n >= number(ts, args[1]) {
		ts.Fatalf("%s takes %d bytes", args[0], n)
	}
}

func number(ts *testscript.TestScript, s string) int64 {
	n, err := strconv.ParseInt(s, 0, 64)
	ts.Check(err)
	return n
}
