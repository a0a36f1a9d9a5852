package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"afterimage/internal/pki"
)

func (a *app) certCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cert",
		Short: "Make, show and renew the certificates of hosts",
		Long: `Between hosts everything is TLS 1.3 with certificates on both sides, which must come
from one CA. The first name of a certificate is the identity of its host.

Run init on one host, issue there for every other, and take each directory to its
host over a line that nobody listens to. Keep ca-key.pem where you keep your
passwords: whoever has it can pass for any host.`,
		Example: `  afterimage cert init --tls-dir /etc/afterimage/tls --name host1.example.com,10.0.0.1
  afterimage cert issue --ca /etc/afterimage/tls --tls-dir host2 --name host2.example.com,10.0.0.2`,
	}
	noun(cmd)
	cmd.AddCommand(a.certInitCommand(), a.certIssueCommand(), a.certShowCommand(), a.certRotateCommand())
	return cmd
}

// certOptions are the flags of the commands that make certificates.
type certOptions struct {
	dir, ca, names string
	days           int
}

const certDays = int(pki.HostValid / (24 * time.Hour))

// certDaysMax is as long as a CA is good for; certificates end with it anyway.
const certDaysMax = 3650

func (o *certOptions) flags(cmd *cobra.Command, names string) {
	cmd.Flags().StringVar(&o.dir, "tls-dir", "", "the `DIR` of the host's certificate")
	cmd.Flags().StringVar(&o.names, "name", "", names)
	cmd.Flags().IntVar(&o.days, "days", certDays, "how many `DAYS` the host's certificate is good for; 0 makes one that has expired, to rehearse that")
}

// parse checks the flags. Without --name there are no names.
func (o *certOptions) parse() ([]string, pki.Options, error) {
	var po pki.Options
	if o.dir == "" {
		return nil, po, usagef("say with --tls-dir in which directory the certificate is")
	}
	if o.days < 0 || o.days > certDaysMax {
		return nil, po, usagef("--days %d: 0 to %d are possible", o.days, certDaysMax)
	}
	po.Valid = time.Duration(o.days) * 24 * time.Hour
	if o.days == 0 {
		po.Valid = -time.Second
	}
	if o.names == "" {
		return nil, po, nil
	}
	names, err := pki.ParseNames(o.names)
	if err != nil {
		return nil, po, usagef("--name %s: %w", o.names, err)
	}
	return names, po, nil
}

// parseNamed is parse where --name is needed.
func (o *certOptions) parseNamed() ([]string, pki.Options, error) {
	names, po, err := o.parse()
	if err == nil && names == nil {
		err = usagef("say with --name what the host is called: its name, and other names and addresses by which it is dialed")
	}
	return names, po, err
}

const namesFlag = "`NAME[,ALIAS...]` of the host: the first is its identity, the others are names and addresses by which it is dialed"

func (a *app) certInitCommand() *cobra.Command {
	var o certOptions
	cmd := &cobra.Command{
		Use:   "init --tls-dir DIR --name NAME[,ALIAS...]",
		Short: "Make a CA and the certificate of the first host",
		Long: `Make a CA (ca.pem and its key ca-key.pem), good for 10 years, and the certificate of
the first host (cert.pem and key.pem) in DIR. What exists is never overwritten.`,
		Example: "  afterimage cert init --tls-dir /etc/afterimage/tls --name host1.example.com,10.0.0.1",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			names, po, err := o.parseNamed()
			if err != nil {
				return err
			}
			if err := pki.Init(o.dir, names, po); err != nil {
				return certError(err, statusRefused)
			}
			return a.printCertMade(o.dir)
		},
	}
	o.flags(cmd, namesFlag)
	return cmd
}

func (a *app) certIssueCommand() *cobra.Command {
	var o certOptions
	cmd := &cobra.Command{
		Use:   "issue --ca DIR --tls-dir DIR2 --name NAME[,ALIAS...]",
		Short: "Make the certificate of another host",
		Long: `Make the certificate of another host (cert.pem and key.pem) in DIR2, signed by the CA
in DIR, with a copy of ca.pem and without the CA's key: DIR2 is what that host needs.
What exists is never overwritten.`,
		Example: "  afterimage cert issue --ca /etc/afterimage/tls --tls-dir host2 --name host2.example.com,10.0.0.2",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			names, po, err := o.parseNamed()
			if err != nil {
				return err
			}
			if o.ca == "" {
				return usagef("say with --ca where the CA is: the directory that 'afterimage cert init' made")
			}
			if err := pki.Issue(o.ca, o.dir, names, po); err != nil {
				return certError(err, statusRefused)
			}
			return a.printCertMade(o.dir)
		},
	}
	o.flags(cmd, namesFlag)
	cmd.Flags().StringVar(&o.ca, "ca", "", "the `DIR` of the CA, with ca-key.pem")
	return cmd
}

func (a *app) certRotateCommand() *cobra.Command {
	var o certOptions
	cmd := &cobra.Command{
		Use:   "rotate --tls-dir DIR [--ca DIR] [--name NAME[,ALIAS...]]",
		Short: "Renew the certificate of a host",
		Long: `Make a new key and a new certificate for the host whose certificate is in DIR, for the
same names unless --name gives others. The CA that signs is that in DIR, or in the
directory that --ca names.

A daemon that runs uses the new one from the next connection on. A crash leaves the
old or the new certificate in use, never half of one.`,
		Example: `  afterimage cert rotate --tls-dir /etc/afterimage/tls
  afterimage cert rotate --tls-dir host2 --ca /etc/afterimage/tls`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			names, po, err := o.parse()
			if err != nil {
				return err
			}
			if err := pki.Rotate(o.dir, o.ca, names, po); err != nil {
				return certError(err, statusRefused)
			}
			return a.printCertMade(o.dir)
		},
	}
	o.flags(cmd, "`NAME[,ALIAS...]` of the host from now on (default: as before)")
	cmd.Flags().StringVar(&o.ca, "ca", "", "the `DIR` of the CA, with ca-key.pem (default: that of --tls-dir)")
	return cmd
}

func (a *app) certShowCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "show --tls-dir DIR",
		Short: "Show the certificate of a host",
		Long: `Show the certificate in DIR. The exit status is 6 if its key does not belong to it, or
if it is not of a CA in ca.pem; what can be said of it is shown all the same. One that
has expired, or expires within 30 days, is shown with a warning.`,
		Example: "  afterimage cert show --tls-dir /etc/afterimage/tls",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if dir == "" {
				return usagef("say with --tls-dir in which directory the certificate is")
			}
			return a.certShow(dir)
		},
	}
	cmd.Flags().StringVar(&dir, "tls-dir", "", "the `DIR` of the host's certificate")
	return cmd
}

// certShown is what the cert commands print under --json.
type certShown struct {
	Name        string     `json:"name"`  // identity of the host
	Names       []string   `json:"names"` // all of them, the identity first
	CA          string     `json:"ca"`    // name of the CA that signed
	CAExpires   *time.Time `json:"ca_expires,omitempty"`
	Issued      time.Time  `json:"issued"`
	Expires     time.Time  `json:"expires"`     // when it or its CA does
	DaysLeft    int        `json:"days_left"`   // whole days; negative: it has expired
	Fingerprint string     `json:"fingerprint"` // SHA-256 of the certificate, in hex
	Expired     bool       `json:"expired"`
	Warnings    []string   `json:"warnings"`
}

func newCertShown(i *pki.Info, now time.Time) certShown {
	s := certShown{
		Name: i.Name, Names: append([]string{}, i.Names...), CA: i.CA, Issued: i.Issued.UTC(), Expires: i.Expires.UTC(),
		DaysLeft: i.DaysLeft(now), Fingerprint: i.Fingerprint, Expired: i.Expired(now), Warnings: append([]string{}, i.Warnings...),
	}
	if !i.CAExpires.IsZero() {
		expires := i.CAExpires.UTC()
		s.CAExpires = &expires
	}
	return s
}

func (a *app) certShow(dir string) error {
	now := time.Now()
	info, unfit := pki.Inspect(dir, now)
	if info == nil {
		return certError(unfit, statusDamaged)
	}
	s := newCertShown(info, now)
	if err := a.printCert(s); err != nil {
		return err
	}
	for _, w := range s.Warnings {
		fmt.Fprintf(a.stderr, "warning: %s\n", w)
	}
	return certError(unfit, statusDamaged)
}

func (a *app) printCert(s certShown) error {
	if a.json {
		return a.printJSON(s)
	}
	left := fmt.Sprintf("%d days left", s.DaysLeft)
	if s.Expired {
		left = "EXPIRED"
	}
	return table(a.stdout, [][]string{
		{"NAME", s.Name},
		{"NAMES", strings.Join(s.Names, ", ")},
		{"CA", s.CA},
		{"ISSUED", s.Issued.Local().Format(time.DateTime)},
		{"EXPIRES", fmt.Sprintf("%s (%s)", s.Expires.Local().Format(time.DateTime), left)},
		{"SHA-256", s.Fingerprint},
	})
}

// printCertMade says what was made in dir.
func (a *app) printCertMade(dir string) error {
	now := time.Now()
	info, err := pki.Inspect(dir, now)
	if err != nil {
		return certError(err, statusDamaged)
	}
	s := newCertShown(info, now)
	if a.json {
		return a.printJSON(s)
	}
	_, err = fmt.Fprintf(a.stdout, "%s: certificate for %s, expires %s\n", dir, strings.Join(s.Names, ", "), s.Expires.Local().Format(time.DateTime))
	return err
}

// certError gives an error of package pki its exit status: files that do not fit
// are damage, and what else is wrong with certificates is as the command says.
func certError(err error, other int) error {
	var e *pki.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Reason {
	case pki.Missing, pki.Exists:
		return err // as for every other file
	case pki.Unpaired, pki.Malformed:
		return withStatus(err, statusDamaged)
	}
	return withStatus(err, other)
}
