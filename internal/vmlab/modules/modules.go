// Package modules says which kernel modules must be loaded, and in which order,
// so that a given one works. It reads what depmod has written beside the modules
// and does what modprobe does, so that a guest needs neither.
//
//	modules.dep      what a module's symbols need
//	modules.softdep  what it asks for by name while it runs: of a guest without
//	                 modprobe it would ask in vain (ext4 for a CRC, for example)
//	modules.alias    which modules serve such a name
//	modules.builtin  what is in the kernel itself
package modules

import (
	"bufio"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// A Module is one file to be loaded.
type Module struct {
	Path   string // within the tree
	Name   string // as /proc/modules has it
	Params string // separated by spaces, as the kernel takes them
	// Optional modules are those that another asks for while it runs. One may
	// refuse to load, for want of the processor that it was made for.
	Optional bool
}

// A Tree is the modules of one kernel.
type Tree struct {
	Root    string              // the directory of that kernel: lib/modules/VERSION
	paths   map[string]string   // by name
	needs   map[string][]string // names by name, in the order of loading
	before  map[string][]string // names or aliases by name, from softdep
	after   map[string][]string
	aliases map[string][]string // names by alias
	builtin map[string]bool     // by name
}

// Open reads the tree of one kernel.
func Open(root string) (*Tree, error) {
	t := &Tree{
		Root: root, paths: map[string]string{}, needs: map[string][]string{}, aliases: map[string][]string{},
		before: map[string][]string{}, after: map[string][]string{}, builtin: map[string]bool{},
	}
	for _, f := range []struct {
		name string
		line func(fields []string) bool
	}{
		{"modules.dep", t.addDep},
		{"modules.softdep", t.addSoftdep},
		{"modules.alias", t.addAlias},
		{"modules.builtin", t.addBuiltin},
	} {
		if err := eachLine(filepath.Join(root, f.name), f.line); err != nil {
			return nil, fmt.Errorf("what the kernel's modules need: %w", err)
		}
	}
	return t, nil
}

// eachLine calls add with the words of each line; false: it makes no sense.
func eachLine(file string, add func(fields []string) bool) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		words := strings.Fields(lines.Text())
		if len(words) > 0 && words[0][0] != '#' && !add(words) {
			return fmt.Errorf("%s: line %d is %q", file, n, lines.Text())
		}
	}
	return lines.Err()
}

// name is what a file, or what a person, calls a module, as the kernel has it:
// a module may be asked for with either of "-" and "_".
func name(s string) string {
	s = path.Base(s)
	s = strings.TrimSuffix(s, ".ko")
	return strings.ReplaceAll(s, "-", "_")
}

func (t *Tree) addDep(f []string) bool {
	file, ok := strings.CutSuffix(f[0], ":")
	if !ok {
		return false
	}
	n := name(file)
	t.paths[n] = file
	for _, need := range slices.Backward(f[1:]) { // what is needed most stands last
		t.needs[n] = append(t.needs[n], name(need))
	}
	return true
}

func (t *Tree) addSoftdep(f []string) bool {
	if f[0] != "softdep" || len(f) < 3 {
		return false
	}
	n := name(f[1])
	to := t.before
	for _, w := range f[2:] {
		switch w {
		case "pre:":
			to = t.before
		case "post:":
			to = t.after
		default:
			to[n] = append(to[n], name(w))
		}
	}
	return true
}

func (t *Tree) addAlias(f []string) bool {
	if f[0] != "alias" || len(f) < 3 {
		return false
	}
	// An alias may have spaces, a name has none.
	alias := name(strings.Join(f[1:len(f)-1], " "))
	t.aliases[alias] = append(t.aliases[alias], name(f[len(f)-1]))
	return true
}

func (t *Tree) addBuiltin(f []string) bool {
	t.builtin[name(f[0])] = true
	return true
}

// Resolve returns what to load, in this order, for what is asked for: names of
// modules, each with its parameters behind it if it has any ("nbd nbds_max=4").
// What is in the kernel itself is left out.
func (t *Tree) Resolve(wanted ...string) ([]Module, error) {
	r := resolver{tree: t, at: map[string]int{}, seen: map[string]bool{}}
	for _, w := range wanted {
		asked, params, _ := strings.Cut(strings.TrimSpace(w), " ")
		if err := r.add(name(asked), false); err != nil {
			return nil, err
		}
		if i, ok := r.at[name(asked)]; ok && params != "" {
			r.order[i].Params = strings.TrimSpace(params)
		} else if params != "" {
			return nil, fmt.Errorf("module %s is not a file of its own: its parameters belong on the kernel's command line", asked)
		}
	}
	return r.order, nil
}

type resolver struct {
	tree  *Tree
	order []Module
	at    map[string]int  // where in order, by name
	seen  map[string]bool // was begun: two may ask for each other
}

func (r *resolver) add(n string, optional bool) error {
	if i, ok := r.at[n]; ok {
		// A Module that someone needs is no longer optional, nor is what that
		// one needs; it stands before it already.
		if r.order[i].Optional && !optional {
			r.order[i].Optional = false
			for _, need := range r.tree.needs[n] {
				if err := r.add(need, false); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if r.seen[n] || r.tree.builtin[n] {
		return nil
	}
	file, ok := r.tree.paths[n]
	if !ok {
		return r.addAlias(n, optional)
	}
	r.seen[n] = true
	for _, soft := range r.tree.before[n] {
		if err := r.add(soft, true); err != nil {
			return err
		}
	}
	for _, need := range r.tree.needs[n] {
		if err := r.add(need, optional); err != nil {
			return err
		}
	}
	r.at[n] = len(r.order)
	r.order = append(r.order, Module{Path: file, Name: n, Optional: optional})
	for _, soft := range r.tree.after[n] {
		if err := r.add(soft, true); err != nil {
			return err
		}
	}
	return nil
}

// addAlias adds all modules that serve a name. As with modprobe, one that
// nobody serves is no matter when it was another module that asked.
func (r *resolver) addAlias(n string, optional bool) error {
	serving := r.tree.aliases[n]
	if len(serving) == 0 && !optional {
		return fmt.Errorf("the kernel has no module %s (looked in %s)", n, r.tree.Root)
	}
	for _, s := range serving {
		if err := r.add(s, optional); err != nil {
			return err
		}
	}
	return nil
}
