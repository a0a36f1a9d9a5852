// Package pki makes the certificates by which hosts know each other, and uses
// them. Between hosts everything is TLS 1.3 with certificates on both sides, all
// of them signed by a CA that both sides have in their ca.pem.
//
//	name.go       the names of a host: the first one is its identity
//	authority.go  a CA: making it, opening it, signing with it
//	make.go       Init, Issue: the files of a host that has none
//	rotate.go     Rotate: a new certificate in the place of the old one
//	load.go       reading the files, and which of them belong together
//	files.go      Files: the two sides of a handshake, from files that may change
//	inspect.go    Inspect: what a directory holds, for people
//	error.go      Error: what is wrong, on which side, and what to do
//	explain.go    Explain: what a failed handshake means
//
// # The files
//
//	ca.pem        the CAs whose certificates are believed; one, or several while
//	              the hosts change from one CA to another
//	cert.pem      the certificate of this host
//	key.pem       its key
//	ca-key.pem    the key of the CA, only where certificates are issued
//	cert.pem.new  the next certificate and its key, while they are
//	key.pem.new   being put in place
//
// Any other tool may write the first three: what counts is that key and
// certificate belong together and that a CA of ca.pem signed it.
//
// # Rotation
//
// Two files cannot be renamed at once. A reader therefore takes the first of
// cert.pem and cert.pem.new that belongs to key.pem, and the rename of the key
// is the one step by which the new pair takes effect. A crash after step
//
//  0. an earlier rotation that was cut off is finished or swept away
//  1. cert.pem.new and key.pem.new written, both and the directory synced:
//     leaves the old pair in use, and files that the next rotation removes
//  2. key.pem.new renamed to key.pem, the directory synced: leaves the new pair
//     in use, its certificate still in cert.pem.new; the next rotation begins
//     by finishing this one
//  3. cert.pem.new renamed to cert.pem, the directory synced: is none
//
// A step that fails leaves what a crash there would leave. Reading while a
// rotation goes on may meet a moment in which nothing fits, so it is tried again
// while the files change.
//
// A running daemon looks at the files at every handshake, and reads them when
// they are no longer those it knows. Files that cannot be used change nothing:
// the old ones stay in use and Files.Err says why.
package pki
