package main

// Certificates are made here, as the tests need them: nothing in testdata can expire.

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// An authority is a CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// A keyPair is a certificate and its key, in PEM.
type keyPair struct{ cert, key []byte }

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{key: newKey(t)}
	template := newTemplate(t)
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
	a.cert, a.pem = sign(t, template, template, a.key, a.key)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newTemplate is a certificate for 127.0.0.1 and localhost, good for servers and clients for an hour.
func newTemplate(t testing.TB) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		t.Fatal(err)
	}
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "test " + serial.String()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func sign(t testing.TB, template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) (*x509.Certificate, []byte) {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// issue makes a certificate; edit may change what is asked for.
func (a *authority) issue(t testing.TB, edit ...func(*x509.Certificate)) keyPair {
	t.Helper()
	template := newTemplate(t)
	for _, e := range edit {
		e(template)
	}
	key := newKey(t)
	_, cert := sign(t, template, a.cert, key, a.key)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return keyPair{cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})}
}

func expired(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }

// until makes a certificate that expires so many minutes from now.
func until(minutes int) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Duration(minutes) * time.Minute) }
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

func (p keyPair) certificate(t testing.TB) *tls.Certificate {
	t.Helper()
	c, err := tls.X509KeyPair(p.cert, p.key)
	if err != nil {
		t.Fatal(err)
	}
	return &c
}

// A secretFolder is a directory of files that change while the relay runs.
type secretFolder string

func newFolder(t testing.TB) secretFolder { return secretFolder(t.TempDir()) }

func (f secretFolder) path(name string) string { return filepath.Join(string(f), name) }

// put replaces a file in one step, readable by its owner alone, and returns its path.
func (f secretFolder) put(t testing.TB, name string, content []byte) string {
	t.Helper()
	if err := os.WriteFile(f.path(name+".new"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(f.path(name+".new"), f.path(name)); err != nil {
		t.Fatal(err)
	}
	return f.path(name)
}

// putPair writes name.crt and name.key.
func (f secretFolder) putPair(t testing.TB, name string, p keyPair) {
	t.Helper()
	f.put(t, name+".crt", p.cert)
	f.put(t, name+".key", p.key)
}

// serverFlags writes server.crt and server.key and returns the flags that name them.
func (f secretFolder) serverFlags(t testing.TB, p keyPair) []string {
	t.Helper()
	f.putPair(t, "server", p)
	return []string{"-tls-cert-file", f.path("server.crt"), "-tls-key-file", f.path("server.key")}
}

// trusting is the TLS side of a client: the CA it trusts and the certificate it shows, whatever the server asks for.
func trusting(ca *authority, own *tls.Certificate) *tls.Config {
	c := &tls.Config{RootCAs: ca.pool()}
	if own != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own, nil }
	}
	return c
}

// newTLSClient speaks "HTTP/1.1" or "h2".
func newTLSClient(t testing.TB, proto string, config *tls.Config) *http.Client {
	t.Helper()
	tr := &http.Transport{DisableCompression: true, TLSClientConfig: config.Clone(), Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(proto != "h2")
	tr.Protocols.SetHTTP2(proto == "h2")
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

// eachTLSProto runs a test over HTTP/1.1 and HTTP/2, both over TLS.
func eachTLSProto(t *testing.T, test func(t *testing.T, proto string)) {
	for _, proto := range []string{"HTTP/1.1", "h2"} {
		t.Run(proto, func(t *testing.T) {
			t.Parallel()
			test(t, proto)
		})
	}
}

func (p *program) tlsURL(path string) string { return "https://" + p.addr + path }

// hangUp sends SIGHUP and waits until the files were read again.
func (p *program) hangUp(t testing.TB) {
	t.Helper()
	const began = "reading all certificates and credentials again"
	before := strings.Count(p.stderr.String(), began)
	p.signal(t, syscall.SIGHUP)
	eventually(t, "SIGHUP is noticed", func() bool { return strings.Count(p.stderr.String(), began) > before })
}

// newTLSPeer starts an upstream that speaks TLS, and HTTP/2 unless config says otherwise, and returns it with its address.
func newTLSPeer(t testing.TB, config *tls.Config, answer func(w http.ResponseWriter, r *http.Request, n int)) (*peer, string) {
	t.Helper()
	p := newPeer(t, answer)
	s := httptest.NewUnstartedServer(p.Config.Handler)
	s.TLS, s.EnableHTTP2 = config.Clone(), config.NextProtos == nil
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	s.StartTLS()
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return p, s.URL
}

func serving(t testing.TB, p keyPair) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*p.certificate(t)}}
}

// shown is the serial number of the certificate that a client meets who names no server.
func shown(t testing.TB, addr string, config *tls.Config) string {
	t.Helper()
	c, err := tls.Dial("tcp", addr, config) // an IP address is no server name (RFC 6066, section 3)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func (p keyPair) serial(t testing.TB) string { return p.certificate(t).Leaf.SerialNumber.String() }

func TestTLSServesAllProtocols(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := newPeer(t, nil)
	relay := start(t, append(newFolder(t).serverFlags(t, ca.issue(t)), "-upstream", up.URL)...)
	eachTLSProto(t, func(t *testing.T, proto string) {
		c := newTLSClient(t, proto, trusting(ca, nil))
		resp := post(t, c, relay.tlsURL("/ingest?name=a"), []byte("profile"))
		want := map[string]string{"h2": "HTTP/2.0"}[proto]
		if want == "" {
			want = proto
		}
		if resp.StatusCode != http.StatusOK || resp.Proto != want {
			t.Errorf("%s %s", resp.Proto, resp.Status)
		}
		if resp.TLS.CurveID != tls.X25519MLKEM768 {
			t.Errorf("key exchange %v", resp.TLS.CurveID)
		}
		sent, body := parseRequest(t, capture(t, "connect-go-grpc.http"))
		resp = post(t, c, relay.tlsURL(pushPath), body, "Content-Type", sent.Header.Get("Content-Type"), "Te", "trailers")
		if resp.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("gRPC over %s: %v, trailer %v", resp.Proto, resp.Status, resp.Trailer)
		}
	})
}

func TestTLSFromTheEnvironment(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	pair := ca.issue(t)
	relay := startEnv(t, []string{"PYROSCOPE_RELAY_TLS_CERT_PEM=" + string(pair.cert), "PYROSCOPE_RELAY_TLS_KEY_PEM=" + string(pair.key)}, "-upstream", "log:")
	if got := shown(t, relay.addr, trusting(ca, nil)); got != pair.serial(t) {
		t.Errorf("certificate %s, want %s", got, pair.serial(t))
	}
	if got, want := relay.metric(t, "pyroscope_relay_tls_certificate_expiry_seconds"), pair.certificate(t).Leaf.NotAfter.Unix(); got != float64(want) {
		t.Errorf("expiry %v, want %v", got, want)
	}
}

func TestTLSMinVersion(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	flags := newFolder(t).serverFlags(t, ca.issue(t))
	for _, test := range []struct {
		flag    string
		client  uint16
		allowed bool
	}{
		{"TLS12", tls.VersionTLS11, false}, {"TLS12", tls.VersionTLS12, true},
		{"TLS13", tls.VersionTLS12, false}, {"TLS13", tls.VersionTLS13, true},
	} {
		t.Run(test.flag+" "+tls.VersionName(test.client), func(t *testing.T) {
			t.Parallel()
			relay := start(t, append(flags, "-upstream", "log:", "-tls-min-version", test.flag)...)
			config := trusting(ca, nil)
			config.MinVersion, config.MaxVersion = test.client, test.client
			c, err := tls.Dial("tcp", relay.addr, config)
			if (err == nil) != test.allowed {
				t.Errorf("handshake: %v", err)
			}
			if err == nil {
				c.Close()
			}
		})
	}
}

func TestClientAuthTypes(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	f := newFolder(t)
	flags := append(f.serverFlags(t, ca.issue(t)), "-upstream", "log:")
	caFlags := []string{"-tls-client-ca-file", f.put(t, "ca.crt", ca.pem)}
	certs := map[string]*tls.Certificate{
		"none": nil, "expired": ca.issue(t, expired).certificate(t), "wrong CA": other.issue(t).certificate(t), "good": ca.issue(t).certificate(t),
	}
	for authType, allowed := range map[string][]string{
		"NoClientCert":               {"none", "expired", "wrong CA", "good"},
		"RequestClientCert":          {"none", "expired", "wrong CA", "good"},
		"RequireAnyClientCert":       {"expired", "wrong CA", "good"},
		"VerifyClientCertIfGiven":    {"none", "good"},
		"RequireAndVerifyClientCert": {"good"},
	} {
		t.Run(authType, func(t *testing.T) {
			t.Parallel()
			args := append(slices.Clone(flags), "-tls-client-auth-type", authType)
			if strings.Contains(authType, "Verify") {
				args = append(args, caFlags...)
			}
			relay := start(t, args...)
			refused := 0
			for name, cert := range certs {
				for _, proto := range []string{"HTTP/1.1", "h2"} {
					c := newTLSClient(t, proto, trusting(ca, cert))
					resp, err := tryPost(t.Context(), c, relay.tlsURL("/ingest"), nil)
					c.CloseIdleConnections()
					if err == nil {
						resp.Body.Close()
					} else {
						refused++
					}
					if (err == nil) != slices.Contains(allowed, name) {
						t.Errorf("certificate %q over %s: %v", name, proto, err)
					}
				}
			}
			relay.awaitMetric(t, "pyroscope_receive_http_tls_handshake_errors_total", float64(refused))
			relay.awaitMetric(t, "pyroscope_receive_http_tcp_connections", 0)
		})
	}
}

// checkConfig runs -check in this process and returns the exit code and all output.
func checkConfig(t testing.TB, args ...string) (int, string) {
	t.Helper()
	var out output
	code := run(t.Context(), append([]string{"-check"}, args...), &out, &out)
	return code, out.String()
}

// A faulty configuration and words that its message must have.
type faulty struct {
	args []string
	want []string
}

func (f *faulty) test(t *testing.T, secrets ...string) {
	t.Helper()
	code, out := checkConfig(t, f.args...)
	if code != exitUsage {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	for _, w := range f.want {
		if !strings.Contains(out, w) {
			t.Errorf("the message does not say %q:\n%s", w, out)
		}
	}
	for _, s := range secrets {
		if strings.Contains(out, s) {
			t.Errorf("the message repeats %q:\n%s", s, out)
		}
	}
}

func TestTLSFlagFaults(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	pair := ca.issue(t)
	f := newFolder(t)
	f.serverFlags(t, pair)
	cert, key := "-tls-cert-file="+f.path("server.crt"), "-tls-key-file="+f.path("server.key")
	certPEM, keyPEM := "-tls-cert-pem="+string(pair.cert), "-tls-key-pem="+string(pair.key)
	caFile, caPEM := "-tls-client-ca-file="+f.put(t, "ca.crt", ca.pem), "-tls-client-ca-pem="+string(ca.pem)
	const verify, auth = "-tls-client-auth-type=RequireAndVerifyClientCert", "-tls-client-auth-type"
	for name, test := range map[string]faulty{
		"two certificates":          {[]string{cert, certPEM, key}, []string{"-tls-cert-file and -tls-cert-pem"}},
		"two keys":                  {[]string{cert, key, keyPEM}, []string{"-tls-key-file and -tls-key-pem"}},
		"two CAs":                   {[]string{cert, key, caFile, caPEM, verify}, []string{"-tls-client-ca-file and -tls-client-ca-pem"}},
		"certificate alone":         {[]string{cert}, []string{"-tls-cert-file needs -tls-key-file"}},
		"certificate in PEM alone":  {[]string{certPEM}, []string{"-tls-cert-pem needs -tls-key-file"}},
		"key alone":                 {[]string{key}, []string{"-tls-key-file needs -tls-cert-file"}},
		"key in PEM alone":          {[]string{keyPEM}, []string{"-tls-key-pem needs -tls-cert-file"}},
		"verify without CA":         {[]string{cert, key, verify}, []string{auth, "-tls-client-ca-file"}},
		"verify if, without CA":     {[]string{cert, key, auth + "=VerifyClientCertIfGiven"}, []string{auth, "-tls-client-ca-file"}},
		"CA not used":               {[]string{cert, key, caFile}, []string{"-tls-client-ca-file", auth, "NoClientCert"}},
		"CA not used by require":    {[]string{cert, key, caPEM, auth + "=RequireAnyClientCert"}, []string{"-tls-client-ca-pem", auth}},
		"unknown auth type":         {[]string{cert, key, auth + "=requireandverify"}, []string{auth, "requireandverify", "VerifyClientCertIfGiven"}},
		"unknown version":           {[]string{cert, key, "-tls-min-version=1.2"}, []string{"-tls-min-version", "TLS12", "TLS13"}},
		"client CA without TLS":     {[]string{caFile, verify}, []string{"-tls-client-ca-file", "-tls-cert-file", "-tls-key-file"}},
		"auth type without TLS":     {[]string{auth + "=RequireAnyClientCert"}, []string{auth, "-tls-cert-file"}},
		"version without TLS":       {[]string{"-tls-min-version=TLS13"}, []string{"-tls-min-version", "-tls-cert-file"}},
		"several":                   {[]string{cert, certPEM, keyPEM, auth + "=x", "-tls-min-version=x", "-listen-port=-1"}, []string{"-tls-cert-file", auth, "-tls-min-version", "-listen-port"}},
		"the key where a file goes": {[]string{cert, "-tls-key-file=" + string(pair.key)}, []string{"-tls-key-file"}},
		"the key as certificate":    {[]string{"-tls-cert-pem=" + string(pair.key), keyPEM}, []string{"-tls-cert-pem", "-tls-key-pem"}},
		"the key as CA":             {[]string{cert, key, verify, "-tls-client-ca-pem=" + string(pair.key)}, []string{"-tls-client-ca-pem"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test.args = append(test.args, "-upstream", "log:")
			test.test(t, strings.Split(string(pair.key), "\n")[1], string(f))
		})
	}
	for name, args := range map[string][]string{
		"files": {cert, key}, "PEM": {certPEM, keyPEM}, "mixed": {cert, keyPEM}, "mixed the other way": {certPEM, key},
		"mTLS": {cert, key, caFile, verify}, "mTLS with PEM": {cert, key, caPEM, auth + "=VerifyClientCertIfGiven"},
	} {
		if code, out := checkConfig(t, append(args, "-upstream", "log:")...); code != exitOK || out != "ok\n" {
			t.Errorf("%s: exit code %d:\n%s", name, code, out)
		}
	}
}

func TestTLSFileFaults(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	pair := ca.issue(t)
	f := newFolder(t)
	cert, key := f.put(t, "good.crt", pair.cert), f.put(t, "good.key", pair.key)
	caFile := f.put(t, "ca.crt", ca.pem)
	half := append(slices.Clone(ca.pem), bytes.Replace(ca.pem, []byte("\n"), []byte("\n!"), 2)...)
	for name, test := range map[string]struct{ cert, key, ca, want string }{
		"missing certificate": {f.path("none"), key, caFile, "-tls-cert-file"},
		"missing key":         {cert, f.path("none"), caFile, "-tls-key-file"},
		"missing CA":          {cert, key, f.path("none"), "-tls-client-ca-file"},
		"directory":           {cert, string(f), caFile, "-tls-key-file"},
		"empty key":           {cert, f.put(t, "empty", []byte(" \n")), caFile, "-tls-key-file"},
		"huge key":            {cert, f.put(t, "huge", make([]byte, maxFile+1)), caFile, "-tls-key-file"},
		"no certificate":      {f.put(t, "text", []byte("hello certificate\n")), key, caFile, "-tls-cert-file"},
		"another's key":       {cert, f.put(t, "other.key", ca.issue(t).key), caFile, "-tls-key-file"},
		"no CA":               {cert, key, f.path("text"), "-tls-client-ca-file"},
		"half the CAs":        {cert, key, f.put(t, "half", half), "-tls-client-ca-file"},
		"cut CA":              {cert, key, f.put(t, "cut", ca.pem[:len(ca.pem)-40]), "-tls-client-ca-file"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fault := faulty{[]string{"-upstream", "log:", "-tls-cert-file", test.cert, "-tls-key-file", test.key, "-tls-client-ca-file", test.ca,
				"-tls-client-auth-type", "RequireAndVerifyClientCert"}, []string{test.want}}
			fault.test(t, string(f), "hello")
		})
	}
}

func TestUpstreamLinkFaults(t *testing.T) {
	t.Parallel()
	pair := newAuthority(t).issue(t)
	f := newFolder(t)
	f.putPair(t, "client", pair)
	cert, key, pass := f.path("client.crt"), f.path("client.key"), f.put(t, "pass", []byte("pa55word"))
	for spec, want := range map[string]string{
		"https://h,tls-cert-file=" + cert:                                                                                "tls-key-file",
		"https://h,tls-key-file=" + key:                                                                                  "tls-cert-file",
		"https://h,tls-cert-file=" + key + ",tls-key-file=" + cert:                                                       "tls-cert-file and tls-key-file",
		"https://h,tls-ca-file=" + key:                                                                                   "tls-ca-file",
		"https://h,tls-ca-file=":                                                                                         "tls-ca-file",
		"https://h,tls-ca-file=" + f.path("none"):                                                                        "tls-ca-file",
		"https://h,tls-min-version=TLS11":                                                                                "TLS12 or TLS13",
		"https://h,tls-insecure-skip-verify=hunter22":                                                                    "tls-insecure-skip-verify",
		"http://h,tls-insecure-skip-verify=true":                                                                         "https://",
		"http://h,tls-server-name=x,tls-ca-file=" + cert:                                                                 "tls-server-name, tls-ca-file",
		"https://h,basic-auth-username=u":                                                                                "basic-auth-password-file",
		"https://h,basic-auth-password-file=" + pass:                                                                     "basic-auth-username",
		"https://h,basic-auth-username=u:v,basic-auth-password-file=" + pass:                                             "colon",
		"https://h,basic-auth-username=u,basic-auth-password-file=hunter22":                                              "basic-auth-password-file",
		"https://h,basic-auth-username=u,basic-auth-password-file=" + f.put(t, "e", nil):                                 "empty",
		"https://h,bearer-token-file=" + f.put(t, "nl", []byte("\n\n")):                                                  "empty",
		"https://h,bearer-token-file=" + f.put(t, "two", []byte("hunter22\nx")):                                          "more than one line",
		"https://h,bearer-token-file=" + f.put(t, "space", []byte("hunter22 x")):                                         "no spaces",
		"https://h,basic-auth-username=u,basic-auth-password-file=" + pass + ",bearer-token-file=" + pass:                "give one or the other",
		"https://h,basic-auth-username=u,basic-auth-password-file=" + pass + ",header=authorization: Basic aHVudGVyMjI=": "header Authorization",
		"https://h,bearer-token-file=" + pass + ",header=Authorization: hunter22":                                        "header Authorization",
		"http://h,proxy-url=ftp://u:hunter22@h":                                                                          "proxy-url",
		"http://h,proxy-url=http://u:hunter22@h:x":                                                                       "proxy-url",
		"http://h,proxy-url=http://u:hunter22@h/path":                                                                    "proxy-url",
		"http://h,proxy-url=hunter22":                                                                                    "proxy-url",
		"log:,bearer-token-file=" + pass:                                                                                 "log:",
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			fault := faulty{[]string{"-upstream", spec}, []string{"-upstream number 1: ", want}}
			fault.test(t, "hunter22", "pa55word", "aHVudGVy", string(f))
		})
	}
}

// Every kind of file is swapped again and again while requests run: none fails, and whoever connects anew meets the new
// certificate, clients that name no server too.
func TestRotationUnderLoadFailsNothing(t *testing.T) {
	t.Parallel()
	ca, upCA := newAuthority(t), newAuthority(t)
	upTLS := serving(t, upCA.issue(t))
	upTLS.ClientAuth, upTLS.ClientCAs = tls.RequireAndVerifyClientCert, upCA.pool()
	var wrong atomic.Int64
	up, upURL := newTLSPeer(t, upTLS, func(w http.ResponseWriter, r *http.Request, _ int) {
		if user, password, _ := r.BasicAuth(); user != "u" || !strings.HasPrefix(password, "password ") {
			wrong.Add(1)
		}
		accept(w, r)
	})
	f := newFolder(t)
	put := func(n int) keyPair {
		pair := ca.issue(t, until(60+n))
		f.putPair(t, "server", pair)
		f.put(t, "clients.crt", append(newAuthority(t).pem, ca.pem...))
		f.put(t, "upstream.crt", append(newAuthority(t).pem, upCA.pem...))
		f.putPair(t, "client", upCA.issue(t))
		f.put(t, "password", fmt.Appendf(nil, "password %d\n", n))
		return pair
	}
	put(0)
	relay := start(t, "-tls-cert-file", f.path("server.crt"), "-tls-key-file", f.path("server.key"),
		"-tls-client-ca-file", f.path("clients.crt"), "-tls-client-auth-type", "RequireAndVerifyClientCert",
		"-upstream", upURL+",tls-ca-file="+f.path("upstream.crt")+",tls-cert-file="+f.path("client.crt")+",tls-key-file="+f.path("client.key")+
			",basic-auth-username=u,basic-auth-password-file="+f.path("password"))
	config := trusting(ca, ca.issue(t).certificate(t))
	var workers sync.WaitGroup
	var done atomic.Bool
	const each = 50
	for _, proto := range []string{"HTTP/1.1", "h2", "HTTP/1.1 without keep-alive"} {
		c := newTLSClient(t, proto, config)
		c.Transport.(*http.Transport).DisableKeepAlives = strings.HasSuffix(proto, "keep-alive")
		workers.Go(func() {
			for range each {
				resp, err := tryPost(t.Context(), c, relay.tlsURL("/ingest"), []byte("profile"))
				if err != nil {
					t.Error(err)
					return
				}
				if resp := readAll(t, resp); resp.StatusCode != http.StatusOK {
					t.Errorf("%s: %s", resp.Status, resp.body)
				}
			}
		})
	}
	go func() {
		workers.Wait()
		done.Store(true)
	}()
	for n := 1; n <= 3 || !done.Load(); n++ {
		pair := put(n)
		relay.hangUp(t)
		relay.awaitMetric(t, "pyroscope_relay_tls_certificate_expiry_seconds", float64(pair.certificate(t).Leaf.NotAfter.Unix()))
		if got := shown(t, relay.addr, config); got != pair.serial(t) {
			t.Errorf("swap %d: a client without a server name met another certificate", n)
		}
	}
	workers.Wait()
	got := up.requests()
	if len(got) != 3*each || wrong.Load() > 0 {
		t.Errorf("%d of %d requests arrived, %d with a wrong password", len(got), 3*each, wrong.Load())
	}
	if strings.Contains(relay.stderr.String(), "upstream is down") {
		t.Error("an attempt at the upstream failed")
	}
}

// follower runs follow on sources under the clock of a synctest bubble, until the test ends.
func follower(t *testing.T, sources []*source) *output {
	t.Helper()
	var log output
	go follow(t.Context(), sources, nil, slog.New(slog.NewTextHandler(&log, nil)))
	return &log
}

// noticed is the time in which a change of files must be in use.
const noticed = 10 * time.Second

func TestChangedFilesAreNoticedByContent(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	pairs := []keyPair{ca.issue(t), ca.issue(t), ca.issue(t), ca.issue(t)}
	f := newFolder(t)
	synctest.Test(t, func(t *testing.T) {
		s := newServerTLS()
		f.serverFlags(t, pairs[0])
		s.cert.file, s.key.file = f.path("server.crt"), f.path("server.key")
		sources, err := s.open()
		if err != nil {
			t.Fatal(err)
		}
		log := follower(t, sources)
		time.Sleep(time.Second) // or files would change in the moment in which they are read
		serves := func(what string, want keyPair) {
			t.Helper()
			time.Sleep(noticed)
			if got := s.current.Load().Certificates[0].Leaf.SerialNumber.String(); got != want.serial(t) {
				t.Errorf("%s: another certificate is in use\n%s", what, log)
			}
		}
		serves("at start", pairs[0])
		f.putPair(t, "server", pairs[1])
		for _, name := range []string{"server.crt", "server.key"} {
			os.Chtimes(f.path(name), time.Unix(1, 0), time.Unix(1, 0))
		}
		serves("after a change with an old modification time", pairs[1])
		f.put(t, "server.key", pairs[2].key)
		time.Sleep(10 * noticed)
		serves("with another's key", pairs[1])
		os.Remove(f.path("server.crt"))
		time.Sleep(10 * noticed)
		serves("without a certificate", pairs[1])
		if n := strings.Count(log.String(), "level=ERROR"); n != 2 || !strings.Contains(log.String(), "-tls-cert-file") {
			t.Errorf("%d errors logged, want one for each change:\n%s", n, log)
		}
		f.putPair(t, "server", pairs[3])
		serves("mended", pairs[3])
	})
}

// Kubernetes replaces a mounted secret by renaming a symbolic link to its directory.
func TestSwappedSymlinksAreNoticed(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	turn := func(version string) {
		dir := f.path(version)
		if os.Mkdir(dir, 0o700) != nil || os.WriteFile(filepath.Join(dir, "token"), []byte("token-"+version), 0o600) != nil ||
			os.Symlink(version, f.path("..data.new")) != nil || os.Rename(f.path("..data.new"), f.path("..data")) != nil {
			t.Fatal("cannot make the directory")
		}
	}
	turn("v1")
	if err := os.Symlink("..data/token", f.path("token")); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		u, err := parseUpstream("http://h,bearer-token-file="+f.path("token"), retryPolicy{timeout: 1, minBackoff: 1, maxBackoff: 1})
		if err != nil {
			t.Fatal(err)
		}
		follower(t, u.sources)
		time.Sleep(time.Second)
		turn("v2")
		time.Sleep(noticed)
		if got := u.link.header().Get("Authorization"); got != "Bearer token-v2" {
			t.Errorf("Authorization: %s", got)
		}
	})
}

// A pipe, such as the shell's <(command) makes, can be read once. Looking at it again must not wait for another writer.
func TestPipeIsReadOnce(t *testing.T) {
	t.Parallel()
	in := &input{name: "bearer-token", file: newFolder(t).path("pipe")}
	if err := exec.Command("mkfifo", in.file).Run(); err != nil {
		t.Skip("no mkfifo here: ", err)
	}
	r, err := os.OpenFile(in.file, os.O_RDONLY|syscall.O_NONBLOCK, 0) // keeps what is written until it is read
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := os.WriteFile(in.file, []byte("token"), 0); err != nil {
		t.Fatal(err)
	}
	if b, err := in.read(); string(b) != "token" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := in.read(); err == nil || !strings.HasSuffix(err.Error(), "empty") {
		t.Error(err)
	}
}

// A pipe that is held open by somebody who says nothing must not end all rotation.
func TestSilentPipeIsGivenUp(t *testing.T) {
	t.Parallel()
	in := &input{name: "bearer-token", file: newFolder(t).path("pipe")}
	if err := exec.Command("mkfifo", in.file).Run(); err != nil {
		t.Skip("no mkfifo here: ", err)
	}
	w, err := os.OpenFile(in.file, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := in.read(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

// In a TLS record a single byte of a head is not to be told from a whole one: half a head is cut all the same.
func TestHalfAHeadOverTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	f := newFolder(t)
	relay := start(t, append(f.serverFlags(t, ca.issue(t)), "-upstream", "log:", "-server-read-timeout", "300ms")...)
	c, err := tls.Dial("tcp", relay.addr, trusting(ca, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	keepAlive(t, c)
	write(t, c, "P")
	ended(t, c)
}

// A session that began under one CA ends with it, while the change of the server's certificate leaves it alone.
func TestResumedSessionsAreVerifiedAgain(t *testing.T) {
	t.Parallel()
	ca, next := newAuthority(t), newAuthority(t)
	f := newFolder(t)
	relay := start(t, append(f.serverFlags(t, ca.issue(t)), "-tls-client-auth-type", "RequireAndVerifyClientCert",
		"-tls-client-ca-file", f.put(t, "clients.crt", ca.pem), "-upstream", "log:")...)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		config := trusting(ca, ca.issue(t).certificate(t))
		config.ClientSessionCache, config.MaxVersion = tls.NewLRUClientSessionCache(1), version
		resumed := func() (bool, error) {
			c := newTLSClient(t, "HTTP/1.1", config) // a connection of its own
			resp, err := tryPost(t.Context(), c, relay.tlsURL("/ingest"), nil)
			if err != nil {
				return false, err
			}
			readAll(t, resp)
			c.CloseIdleConnections()
			return resp.TLS.DidResume, nil
		}
		expect := func(what string, want bool) {
			t.Helper()
			if did, err := resumed(); did != want || err != nil {
				t.Errorf("%s, %s: resumed %v, error %v", tls.VersionName(version), what, did, err)
			}
		}
		expect("first", false)
		expect("second", true)
		pair := ca.issue(t, until(int(version)))
		f.putPair(t, "server", pair)
		relay.hangUp(t)
		eventually(t, "the new certificate is served", func() bool {
			return relay.metric(t, "pyroscope_relay_tls_certificate_expiry_seconds") == float64(pair.certificate(t).Leaf.NotAfter.Unix())
		})
		expect("after another server certificate", true)
		f.put(t, "clients.crt", next.pem)
		relay.hangUp(t)
		eventually(t, "the session is refused", func() bool {
			_, err := resumed()
			return err != nil
		})
		config.GetClientCertificate = trusting(ca, next.issue(t).certificate(t)).GetClientCertificate
		expect("with a certificate of the new CA", false)
		f.put(t, "clients.crt", ca.pem)
		relay.hangUp(t)
		eventually(t, "the first CA is back", func() bool {
			config.GetClientCertificate = trusting(ca, ca.issue(t).certificate(t)).GetClientCertificate
			_, err := resumed()
			return err == nil
		})
	}
}

func TestVerifyResumed(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	state := func(resumed bool, edit ...func(*x509.Certificate)) tls.ConnectionState {
		return tls.ConnectionState{DidResume: resumed, PeerCertificates: []*x509.Certificate{ca.issue(t, edit...).certificate(t).Leaf}}
	}
	serverOnly := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	for name, test := range map[string]struct {
		state tls.ConnectionState
		roots *x509.CertPool
		good  bool
	}{
		"good":                {state(true), ca.pool(), true},
		"no longer trusted":   {state(true), other.pool(), false},
		"expired meanwhile":   {state(true, expired), ca.pool(), false},
		"not for clients":     {state(true, serverOnly), ca.pool(), false},
		"new session":         {state(false), other.pool(), true}, // crypto/tls has seen to it
		"not verified at all": {state(true), nil, true},
		"none, where one may": {tls.ConnectionState{DidResume: true}, ca.pool(), true},
	} {
		if err := verifyResumed(test.state, test.roots); (err == nil) != test.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A handshake that never ends is cut, gives its slot back, and is counted and logged once.
func TestStalledHandshakeIsCut(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	relay := start(t, append(newFolder(t).serverFlags(t, ca.issue(t)), "-upstream", "log:", "-conn-limit", "1",
		"-server-read-timeout", "200ms", "-log-level", "debug")...)
	for i, hello := range []string{"", "\x16\x03\x01\x02\x00\x01"} {
		c, err := net.Dial("tcp", relay.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, hello)
		io.Copy(io.Discard, c) // to the end of the connection
		relay.awaitHandshakeErrors(t, i+1)
	}
	eventually(t, "the slot is free", func() bool {
		resp, err := tryPost(t.Context(), newTLSClient(t, "h2", trusting(ca, nil)), relay.tlsURL("/ingest"), nil)
		if err != nil {
			return false // on a busy machine even this one may be cut
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// awaitHandshakeErrors waits until so many handshakes have failed, and expects a line for each and no connection open.
func (p *program) awaitHandshakeErrors(t testing.TB, n int) {
	t.Helper()
	p.awaitMetric(t, "pyroscope_receive_http_tls_handshake_errors_total", float64(n))
	p.awaitMetric(t, "pyroscope_receive_http_tcp_connections", 0)
	if lines := strings.Count(p.stderr.String(), "TLS handshake error"); lines != n {
		t.Errorf("%d lines for %d failed handshakes", lines, n)
	}
}

func TestPlainHTTPOnTheTLSPort(t *testing.T) {
	t.Parallel()
	relay := start(t, append(newFolder(t).serverFlags(t, newAuthority(t).issue(t)), "-upstream", "log:", "-log-level", "debug")...)
	if resp := sendRaw(t, relay.addr, []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n")); resp.StatusCode != http.StatusBadRequest {
		t.Error(resp.Status)
	}
	relay.awaitHandshakeErrors(t, 1)
}

// At the connection limit an idle connection makes room, under TLS as without.
func TestIdleTLSConnectionMakesRoom(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	relay := start(t, append(newFolder(t).serverFlags(t, ca.issue(t)), "-upstream", "log:", "-conn-limit", "1")...)
	for _, proto := range []string{"HTTP/1.1", "h2", "HTTP/1.1", "h2"} {
		if resp := post(t, newTLSClient(t, proto, trusting(ca, nil)), relay.tlsURL("/ingest"), nil); resp.StatusCode != http.StatusOK {
			t.Errorf("over %s: %s", proto, resp.Status)
		}
	}
	relay.awaitMetric(t, "pyroscope_receive_http_tcp_connections_reclaimed_total", 3)
	if n := relay.metric(t, "pyroscope_receive_http_tls_handshake_errors_total"); n != 0 {
		t.Errorf("%v handshake errors", n)
	}
}

func TestUpstreamTLS(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	f := newFolder(t)
	caFile, otherFile := ",tls-ca-file="+f.put(t, "ca.crt", ca.pem), ",tls-ca-file="+f.put(t, "other.crt", other.pem)
	f.putPair(t, "client", ca.issue(t))
	client := ",tls-cert-file=" + f.path("client.crt") + ",tls-key-file=" + f.path("client.key")
	plain := serving(t, ca.issue(t))
	named := serving(t, ca.issue(t, func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = []string{"profiles.example"}, nil }))
	mutual := serving(t, ca.issue(t))
	mutual.ClientAuth, mutual.ClientCAs = tls.RequireAndVerifyClientCert, ca.pool()
	old := serving(t, ca.issue(t))
	old.MaxVersion = tls.VersionTLS12
	http1 := serving(t, ca.issue(t))
	http1.NextProtos = []string{"http/1.1"}
	for name, test := range map[string]struct {
		server  *tls.Config
		options string
		status  int
	}{
		"unknown CA":         {plain, "", 502},
		"private CA":         {plain, caFile, 200},
		"wrong CA":           {plain, otherFile, 502},
		"not verified":       {plain, ",tls-insecure-skip-verify=true", 200},
		"verified":           {plain, ",tls-insecure-skip-verify=false", 502},
		"name does not fit":  {named, caFile, 502},
		"name given":         {named, caFile + ",tls-server-name=profiles.example", 200},
		"other name given":   {plain, caFile + ",tls-server-name=profiles.example", 502},
		"no certificate":     {mutual, caFile, 502},
		"client certificate": {mutual, caFile + client, 200},
		"TLS 1.2":            {old, caFile, 200},
		"HTTP/1.1":           {http1, caFile, 200},
		"TLS 1.2 refused":    {old, caFile + ",tls-min-version=TLS13", 502},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up, upURL := newTLSPeer(t, test.server, nil)
			relay := start(t, fastRetries("-upstream", upURL+test.options)...)
			resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("profile"))
			if resp.StatusCode != test.status {
				t.Fatalf("%s: %s", resp.Status, resp.body)
			}
			if test.status == 200 {
				if got := up.one(t); (got.proto == "HTTP/2.0") != (test.server != http1) || string(got.body) != "profile" {
					t.Errorf("%s, body %q", got.proto, got.body)
				}
			} else if string(resp.body) != "upstream-1: could not be reached\n" {
				t.Errorf("the client is told %q", resp.body)
			}
			warned := strings.Contains(relay.stderr.String(), "level=WARN msg=\"tls-insecure-skip-verify")
			if warned != strings.Contains(test.options, "verify=true") {
				t.Errorf("warned: %v", warned)
			}
		})
	}
}

// After a failure the client is renewed; it must go on speaking HTTP/2, and looking whether its connections live.
func TestRenewedClientSpeaksHTTP2(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up, upURL := newTLSPeer(t, serving(t, ca.issue(t)), func(w http.ResponseWriter, r *http.Request, n int) {
		if n <= 2 {
			panic(http.ErrAbortHandler)
		}
		accept(w, r)
	})
	relay := start(t, fastRetries("-upstream", upURL+",tls-ca-file="+newFolder(t).put(t, "ca.crt", ca.pem))...)
	if resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("profile")); resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", resp.Status, resp.body)
	}
	got := up.requests()
	if len(got) != 3 {
		t.Fatalf("%d attempts", len(got))
	}
	for _, r := range got {
		if r.proto != "HTTP/2.0" {
			t.Errorf("attempt over %s", r.proto)
		}
	}
}

// A frozenConn delivers nothing more from the far side once it is frozen, and says nothing of it.
type frozenConn struct {
	net.Conn
	frozen, closed chan struct{}
	once           sync.Once
}

func (c *frozenConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	select {
	case <-c.frozen:
		<-c.closed
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

func (c *frozenConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// An HTTP/2 connection that dies without a word is found dead by a ping, also after the client was renewed.
func TestDeadHTTP2ConnectionIsNoticed(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	server := serving(t, ca.issue(t))
	server.NextProtos = []string{"h2"}
	l := newLink()
	l.current.Store(&tls.Config{RootCAs: ca.pool(), Time: func() time.Time { return ca.cert.NotBefore.Add(time.Minute) }})
	synctest.Test(t, func(t *testing.T) {
		far, near := net.Pipe()
		c := &frozenConn{Conn: near, frozen: make(chan struct{}), closed: make(chan struct{})}
		tr := newTransport(&retryPolicy{timeout: time.Hour}, l)
		tr.DialContext = func(context.Context, string, string) (net.Conn, error) { return c, nil }
		tr = tr.Clone()
		s := &http.Server{TLSConfig: server, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(c.frozen)
			<-r.Context().Done()
		})}
		conns := make(chan net.Conn, 1)
		conns <- far
		served := &chanListener{conns: conns}
		go s.ServeTLS(served, "", "")
		defer s.Close()
		began := time.Now()
		r, _ := http.NewRequest(http.MethodPost, "https://127.0.0.1/", nil)
		_, err := tr.RoundTrip(r)
		if took := time.Since(began); err == nil || took > pingAfter+pingPatience+time.Second {
			t.Errorf("after %v: %v", took, err)
		}
		tr.CloseIdleConnections()
	})
}

// A chanListener accepts what it is sent.
type chanListener struct {
	conns chan net.Conn
	once  sync.Once
}

func (l *chanListener) Accept() (net.Conn, error) {
	if c, ok := <-l.conns; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}

func (l *chanListener) Close() error {
	l.once.Do(func() { close(l.conns) })
	return nil
}

func (l *chanListener) Addr() net.Addr { return &net.TCPAddr{} }

// Once the files of a link change, new requests go out under them; one under way ends as it began.
func TestUpstreamTLSFollowsItsFiles(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	server := serving(t, ca.issue(t))
	server.ClientAuth, server.ClientCAs = tls.RequireAndVerifyClientCert, ca.pool()
	arrived, release := make(chan string, 3), make(chan struct{})
	_, upURL := newTLSPeer(t, server, func(w http.ResponseWriter, r *http.Request, n int) {
		arrived <- r.TLS.PeerCertificates[0].SerialNumber.String()
		if n == 1 {
			<-release
		}
		accept(w, r)
	})
	f := newFolder(t)
	before, after := ca.issue(t), ca.issue(t)
	f.putPair(t, "client", before)
	relay := start(t, fastRetries("-upstream", upURL+",tls-ca-file="+f.put(t, "ca.crt", ca.pem)+",tls-cert-file="+f.path("client.crt")+",tls-key-file="+f.path("client.key"))...)
	send := func(want int) {
		t.Helper()
		if resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), nil); resp.StatusCode != want {
			t.Errorf("%s, want %d: %s", resp.Status, want, resp.body)
		}
	}
	reload := func(n int) {
		t.Helper()
		relay.hangUp(t)
		eventually(t, "the files are in use", func() bool { return strings.Count(relay.stderr.String(), "changed files are in use") == n })
	}
	var underWay sync.WaitGroup
	underWay.Go(func() { send(http.StatusOK) })
	if got := <-arrived; got != before.serial(t) {
		t.Errorf("certificate %s at first", got)
	}
	f.putPair(t, "client", after)
	reload(1)
	send(http.StatusOK)
	if got := <-arrived; got != after.serial(t) {
		t.Errorf("certificate %s after the change, want %s", got, after.serial(t))
	}
	close(release)
	underWay.Wait()
	f.put(t, "ca.crt", other.pem)
	reload(2)
	send(http.StatusBadGateway)
	f.put(t, "ca.crt", ca.pem)
	reload(3)
	send(http.StatusOK)
}

// A proxyServer is an HTTP proxy that notes what it is asked for.
type proxyServer struct {
	mu    sync.Mutex
	calls []string // method, target and Proxy-Authorization
}

func (p *proxyServer) note(words ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, strings.Join(words, " "))
}

func (p *proxyServer) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.calls, "\n")
}

func (p *proxyServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.note(r.Method, r.RequestURI, r.Header.Get("Proxy-Authorization"))
	if r.Method != http.MethodConnect {
		r.Header.Del("Proxy-Authorization")
		resp, err := new(http.Transport).RoundTrip(r)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
		return
	}
	w.WriteHeader(http.StatusOK)
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	splice(c, rw, r.Host)
}

// splice joins a client to a target until both are done.
func splice(c net.Conn, from io.Reader, target string) {
	defer c.Close()
	far, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer far.Close()
	go func() {
		io.Copy(far, from)
		far.Close()
	}()
	io.Copy(c, far)
}

// newSOCKS starts a SOCKS5 proxy (RFC 1928, RFC 1929) that takes one user and password, and returns its address.
func newSOCKS(t testing.TB, p *proxyServer) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serveSOCKS(c)
		}
	}()
	return l.Addr().String()
}

func (p *proxyServer) serveSOCKS(c net.Conn) {
	read := func(n byte) []byte {
		b := make([]byte, n)
		io.ReadFull(c, b)
		return b
	}
	read(read(2)[1])         // methods
	c.Write([]byte{5, 2})    // user and password
	user := read(read(2)[1]) // after the version
	password := read(read(1)[0])
	c.Write([]byte{1, 0})
	kind := read(4)[3]
	host := ""
	if kind == 1 {
		host = net.IP(read(4)).String()
	} else {
		host = string(read(read(1)[0]))
	}
	port := read(2)
	target := net.JoinHostPort(host, fmt.Sprint(int(port[0])<<8|int(port[1])))
	p.note("SOCKS", target, string(user), string(password))
	c.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	splice(c, c, target)
}

func TestProxies(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	caFile := newFolder(t).put(t, "ca.crt", ca.pem)
	for _, kind := range []string{"http", "https", "socks5"} {
		for _, scheme := range []string{"http", "https"} {
			if kind == "https" && scheme == "http" {
				continue // the system's CAs alone vouch for that proxy
			}
			t.Run(scheme+" over "+kind, func(t *testing.T) {
				t.Parallel()
				p := &proxyServer{}
				var addr string
				switch kind {
				case "socks5":
					addr = newSOCKS(t, p)
				default:
					s := httptest.NewUnstartedServer(p)
					if s.TLS = serving(t, ca.issue(t)); kind == "https" {
						s.StartTLS()
					} else {
						s.Start()
					}
					t.Cleanup(s.Close)
					addr = s.Listener.Addr().String()
				}
				up, upURL := newTLSPeer(t, serving(t, ca.issue(t, func(c *x509.Certificate) { c.DNSNames = []string{"profiles.example"} })), nil)
				spec, wantProto := upURL+",tls-ca-file="+caFile+",tls-server-name=profiles.example", "HTTP/2.0"
				target := strings.TrimPrefix(upURL, "https://")
				if scheme == "http" {
					spec, wantProto, target = up.URL, "HTTP/1.1", strings.TrimPrefix(up.URL, "http://")
				}
				relay := startEnv(t, []string{"HTTP_PROXY=http://127.0.0.1:1", "HTTPS_PROXY=http://127.0.0.1:1"},
					"-upstream", spec+",proxy-url="+kind+"://us%3Aer:pass@"+addr)
				if resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest?a=1"), []byte("profile")); resp.StatusCode != http.StatusOK {
					t.Fatalf("%s: %s", resp.Status, resp.body)
				}
				if got := up.one(t); string(got.body) != "profile" || got.proto != wantProto || got.header.Get("Proxy-Authorization") != "" {
					t.Errorf("%+v", got)
				}
				auth := "Basic " + base64.StdEncoding.EncodeToString([]byte("us:er:pass"))
				want := map[string]string{"http": "POST http://" + target + "/ingest?a=1 " + auth, "https": "CONNECT " + target + " " + auth}[scheme]
				if kind == "socks5" {
					want = "SOCKS " + target + " us:er pass"
				}
				if p.String() != want {
					t.Errorf("the proxy saw %q, want %q", p, want)
				}
			})
		}
	}
}

func TestCredentialsFollowTheirFiles(t *testing.T) {
	t.Parallel()
	a, b := newPeer(t, nil), newPeer(t, nil)
	f := newFolder(t)
	password, token := f.put(t, "password", []byte("pass: word\r\n")), f.put(t, "token", []byte("token-1\n"))
	relay := start(t, "-forward-header", "Authorization",
		"-upstream", a.URL+",basic-auth-username=user,basic-auth-password-file="+password, "-upstream", b.URL+",bearer-token-file="+token)
	carried := func() [2]string {
		resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), nil, "Authorization", "Bearer of the client")
		if resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status)
		}
		var got [2]string
		for i, p := range []*peer{a, b} {
			all := p.requests()
			got[i] = strings.Join(all[len(all)-1].header["Authorization"], "|")
		}
		return got
	}
	basic := func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }
	if got, want := carried(), [2]string{basic("user:pass: word"), "Bearer token-1"}; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	f.put(t, "password", nil)
	f.put(t, "token", []byte("token-2"))
	relay.hangUp(t)
	eventually(t, "the new token is used", func() bool { return carried()[1] == "Bearer token-2" })
	if got := carried()[0]; got != basic("user:pass: word") {
		t.Errorf("an empty password file: %q", got)
	}
	if log := relay.stderr.String(); !strings.Contains(log, "basic-auth-password-file cannot be used: it is empty") {
		t.Error("the empty file is not logged")
	}
}

func TestExposedSecretsAreWarnedOf(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	spec := "http://127.0.0.1:1,bearer-token-file=" + f.put(t, "token", []byte("t0ken"))
	const warning = "every user of this host can read the file"
	if relay := start(t, "-upstream", spec); strings.Contains(relay.stderr.String(), warning) {
		t.Error("warned of a file that its owner alone can read")
	}
	if err := os.Chmod(f.path("token"), 0o604); err != nil {
		t.Fatal(err)
	}
	relay := start(t, "-upstream", spec)
	if log := relay.stderr.String(); strings.Count(log, warning) != 1 || !strings.Contains(log, "option=bearer-token-file") {
		t.Error("not warned of a file that everybody can read")
	}
}

// One secret stands in every place that can hold one; none may come out, whatever fails.
func TestSecretsStayInside(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	pair := ca.issue(t)
	f := newFolder(t)
	secrets := map[string]string{
		"password": "Secret<Pass:word&", "token": "Secret-Token", "header": "Secret-Header", "proxy": "Secret-Proxy", "client": "Secret-Client",
		"cookie": "Secret-Cookie", "key": strings.Split(string(pair.key), "\n")[1],
		"basic": base64.StdEncoding.EncodeToString([]byte("user:Secret<Pass:word&")), "proxy basic": base64.StdEncoding.EncodeToString([]byte("user:Secret-Proxy")),
	}
	echo := func(w http.ResponseWriter, r *http.Request, n int) {
		_, password, _ := r.BasicAuth()
		said := fmt.Sprintf("do not know %q, password %s", r.Header, password)
		if r.URL.Path == pushPath { // JSON has escapes for some of it
			w.Header().Set("Content-Type", "application/json")
			b, _ := json.Marshal(map[string]string{"code": "unauthenticated", "message": said})
			said = string(b)
		}
		w.WriteHeader([]int{http.StatusUnauthorized, http.StatusInternalServerError}[n%2])
		io.WriteString(w, said)
	}
	_, tlsURL := newTLSPeer(t, serving(t, ca.issue(t)), echo)
	plain := newPeer(t, echo)
	env := []string{"PYROSCOPE_RELAY_TLS_CERT_PEM=" + string(pair.cert), "PYROSCOPE_RELAY_TLS_KEY_PEM=" + string(pair.key)}
	args := fastRetries("-log-level", "debug",
		"-upstream", tlsURL+",name=a,tls-insecure-skip-verify=true,basic-auth-username=user,basic-auth-password-file="+f.put(t, "password", []byte(secrets["password"])),
		"-upstream", plain.URL+",name=b,bearer-token-file="+f.put(t, "token", []byte(secrets["token"])),
		"-upstream", plain.URL+",name=c,header=Authorization: Bearer "+secrets["header"]+",header=X-Api-Key: "+secrets["header"],
		"-upstream", plain.URL+",name=d,proxy-url=http://user:"+secrets["proxy"]+"@"+strings.TrimPrefix(plain.URL, "http://"),
		"-upstream", "https://127.0.0.1:1,name=e,proxy-url=http://user:"+secrets["proxy"]+"@"+strings.TrimPrefix(plain.URL, "http://"),
		"-upstream", "http://127.0.0.1:1,name=f,proxy-url=socks5://user:"+secrets["proxy"]+"@"+deadAddr(t))
	relay := startEnv(t, env, args...)
	c := newTLSClient(t, "HTTP/1.1", trusting(ca, nil))
	out := map[string]string{}
	for _, path := range []string{"/ingest", pushPath} {
		for i := range 2 {
			resp := post(t, c, relay.tlsURL(path), nil, "Authorization", "Bearer "+secrets["client"], "Cookie", secrets["cookie"], "Content-Type", "application/proto")
			out[fmt.Sprint("answer of ", path, i)] = fmt.Sprint(resp.Header, string(resp.body))
			if resp.StatusCode < 400 {
				t.Errorf("%s: %s", path, resp.Status)
			}
		}
	}
	f.put(t, "token", []byte(secrets["token"]+"\nmore"))
	f.put(t, "password", []byte(secrets["password"]+"\x00"))
	relay.hangUp(t)
	eventually(t, "both broken files are logged", func() bool { return strings.Count(relay.stderr.String(), "level=ERROR") == 2 })
	out["metrics"] = relay.metrics(t)
	_, out["vars"] = get(t, "http://"+relay.admin+"/debug/vars")
	for _, last := range []string{"-h", "-check", "-version"} { // -check meets the broken files
		p, _ := runProgram(t, env, append(args, last)...)
		out[last] = p.stdout.String() + p.stderr.String()
	}
	relay.signal(t, syscall.SIGQUIT) // a dump of all goroutines, as a panic makes it
	relay.wait(t)
	out["log"] = relay.stderr.String()
	if !strings.Contains(out["answer of /ingest0"], "***") || !strings.Contains(out["log"], "attempt failed") || !strings.Contains(out["log"], "goroutine ") {
		t.Error("this test sees less than it should")
	}
	for place, text := range out {
		for name, secret := range secrets {
			if strings.Contains(text, secret) {
				t.Errorf("the %s comes out in the %s:\n%s", name, place, tail(text))
			}
		}
	}
}

// An answer may repeat the credentials of the moment it was asked for, which a change has just replaced.
func TestReplacedSecretsStayInside(t *testing.T) {
	t.Parallel()
	l := newLink()
	if _, err := l.open(&url.URL{Scheme: "http", Host: "a.example"}, http.Header{}, "a"); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		l.authorize("Bearer secret-"+strconv.Itoa(i), "secret-"+strconv.Itoa(i))
	}
	if got, want := l.hide("secret-2, secret-1"), "***, ***"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// What an answer says in JSON is shown as it came on /ingest, unless its escapes hide a secret.
func TestEscapedSecretsStayInside(t *testing.T) {
	t.Parallel()
	hide := func(s string) string { return strings.ReplaceAll(s, "p<ss/word", "***") }
	for _, test := range []struct{ body, want string }{
		{`{"message":"no p<ss/word"}`, `{"message":"no ***"}`},
		{`{"message":"a \u003c b"}`, `{"message":"a \u003c b"}`},
		{`{"message":["no p\u003css\/word"]}`, "HTTP status 401 Unauthorized"},
		{`{"p\u003css/word":`, "HTTP status 401 Unauthorized"},
	} {
		for _, mediaType := range []string{"application/json", "text/plain"} {
			a := answer{status: http.StatusUnauthorized, mediaType: mediaType, body: []byte(test.body)}
			if got, _ := a.words(routeIngest, hide); got != test.want {
				t.Errorf("%s of %s: %s, want %s", mediaType, test.body, got, test.want)
			}
		}
	}
}

func FuzzParseCAs(f *testing.F) {
	ca := newAuthority(f)
	f.Add(ca.pem)
	f.Add(append(ca.pem, ca.pem[:len(ca.pem)/2]...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	in := &input{name: "tls-ca", file: "x"}
	f.Fuzz(func(t *testing.T, b []byte) {
		pool, err := parseCAs(in, b)
		if (err == nil) == (pool == nil) {
			t.Fatal("neither a pool nor an error, or both")
		}
		if err == nil && !x509.NewCertPool().AppendCertsFromPEM(b) {
			t.Fatal("crypto/x509 finds no certificate")
		}
	})
}

func FuzzLinkOptions(f *testing.F) {
	f.Add("proxy-url", "socks5://user:secret@host:1080")
	f.Add("tls-min-version", "TLS13")
	f.Add("tls-insecure-skip-verify", "secret")
	f.Fuzz(func(t *testing.T, name, value string) {
		l := newLink()
		_, err := l.set(name, value)
		if err != nil && len(value) > 4 && strings.Contains(err.Error(), value) && !strings.Contains("want http, https or socks5 and a host want true or false TLS12 or TLS13", value) {
			t.Fatalf("the message repeats the value: %v", err)
		}
		if err == nil && l.proxy != nil {
			tr := newTransport(&retryPolicy{}, l)
			if p, err := tr.Proxy(nil); err != nil || p.Host == "" {
				t.Fatalf("accepted a proxy without a host: %q", value)
			}
		}
	})
}

// CAs that changed are used while the certificate beside them is broken, on both sides.
func TestCAsFollowAloneToo(t *testing.T) {
	t.Parallel()
	f, old, fresh := newFolder(t), newAuthority(t), newAuthority(t)
	flags := append(f.serverFlags(t, old.issue(t)), "-tls-client-ca-file", f.put(t, "ca.crt", old.pem),
		"-tls-client-auth-type", "RequireAndVerifyClientCert", "-upstream", "https://h,tls-ca-file="+f.path("ca.crt")+
			",tls-cert-file="+f.path("server.crt")+",tls-key-file="+f.path("server.key"))
	c, err := parseConfig(flags)
	if err != nil {
		t.Fatal(err)
	}
	f.put(t, "server.crt", []byte("broken"))
	f.put(t, "ca.crt", fresh.pem)
	broken := 0
	for _, s := range c.sources {
		if _, err := s.look(); err != nil {
			broken++
		}
	}
	if in, out := c.tls.current.Load(), c.upstreams[0].link.current.Load(); broken != 2 ||
		!in.ClientCAs.Equal(fresh.pool()) || !out.RootCAs.Equal(fresh.pool()) || len(in.Certificates[0].Certificate) == 0 || len(out.Certificates) != 1 {
		t.Errorf("%d sources were broken; the new CAs are not in use, or the old certificates no longer", broken)
	}
}
