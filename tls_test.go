package main

// Certificates are made here, as the tests need them: nothing in testdata can expire.

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
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

// A folder is a directory of files that change while the relay runs.
type folder string

func newFolder(t testing.TB) folder { return folder(t.TempDir()) }

func (f folder) path(name string) string { return filepath.Join(string(f), name) }

// put replaces a file in one step, readable by its owner alone, and returns its path.
func (f folder) put(t testing.TB, name string, content []byte) string {
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
func (f folder) putPair(t testing.TB, name string, p keyPair) {
	t.Helper()
	f.put(t, name+".crt", p.cert)
	f.put(t, name+".key", p.key)
}

// serverFlags writes server.crt and server.key and returns the flags that name them.
func (f folder) serverFlags(t testing.TB, p keyPair) []string {
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
	tr := &http.Transport{DisableCompression: true, TLSClientConfig: config, Protocols: new(http.Protocols)}
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

// newTLSPeer starts an upstream that speaks TLS, HTTP/2 too, and returns it with its address.
func newTLSPeer(t testing.TB, config *tls.Config, answer func(w http.ResponseWriter, r *http.Request, n int)) (*peer, string) {
	t.Helper()
	p := newPeer(t, answer)
	s := httptest.NewUnstartedServer(p.Config.Handler)
	s.TLS, s.EnableHTTP2 = config, true
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
