package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// The main job: every real client's request arrives at two upstreams, unchanged.
func TestRealRequestsArriveUnchanged(t *testing.T) {
	t.Parallel()
	for _, name := range captures(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := newPeer(t, nil), newPeer(t, nil)
			relay := start(t, "-upstream", a.URL, "-upstream", b.URL)
			raw := capture(t, name)
			resp := sendRaw(t, relay.addr, raw)
			if resp.StatusCode != http.StatusOK {
				t.Fatalf("status %d: %s", resp.StatusCode, resp.body)
			}
			sent, body := parseRequest(t, raw)
			if bytes.HasPrefix([]byte(sent.Header.Get("Content-Type")), []byte("application/grpc")) {
				body = body[envelopePrefix:]
			}
			for _, p := range []*peer{a, b} {
				got := p.one(t)
				if !bytes.Equal(got.body, body) {
					t.Errorf("body changed: %d bytes sent, %d arrived", len(body), len(got.body))
				}
				if got.method != http.MethodPost {
					t.Errorf("method %s", got.method)
				}
			}
			relay.stop(t)
		})
	}
}

func TestJSONLogsReadLikeLogfmt(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	newLogger(&out, &config{logFormat: "json"}).Info("x", "route", routePush, "took", 1500*time.Millisecond, "addr", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80})
	for _, want := range []string{`"level":"INFO"`, `"route":"push"`, `"took":"1.5s"`, `"addr":"127.0.0.1:80"`, `"time":"20`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is missing in %s", want, out.String())
		}
	}
}

// planted stands for a password in the tests below: nothing the program prints may contain it.
const planted = "hunter2hunter2"

// parse reads a command line with log: as its upstream.
func parse(t testing.TB, args ...string) *config {
	t.Helper()
	c, err := parseConfig(append([]string{"-upstream", "log:"}, args...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// faultsOf are the lines that a command line is refused with.
func faultsOf(t testing.TB, args ...string) []string {
	t.Helper()
	_, err := parseConfig(args)
	if err == nil {
		t.Fatalf("%q was accepted", args)
	}
	if strings.Contains(err.Error(), planted) {
		t.Errorf("%q: a secret was repeated: %v", args, err)
	}
	return strings.Split(err.Error(), "\n")
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		"listen-address": "", "listen-port": "8080", "conn-limit": "16384", "server-read-timeout": "30s",
		"server-write-timeout": "30s", "server-idle-timeout": "2m0s", "max-body-size": "64MiB",
		"max-inflight-bytes": "256MiB", "delivery-timeout": "9s", "shutdown-delay": "0s", "shutdown-timeout": "30s",
		"tls-client-auth-type": "NoClientCert", "tls-min-version": "TLS12", "upstream": "", "remote-timeout": "10s",
		"min-backoff-period": "500ms", "max-backoff-period": "5m0s", "max-backoff-retries": "10",
		"retry-on-http-429": "true", "retry-on-http-422": "false", "forward-header": "", "spool-dir": "",
		"spool-max-bytes": "1GiB", "spool-full": "reject", "admin-address": "127.0.0.1:8081", "log-level": "info",
		"log-format": "logfmt", "check": "false", "healthcheck": "false", "version": "false",
	}
	parse(t).flags.VisitAll(func(f *flag.Flag) {
		if w, ok := want[f.Name]; ok && f.DefValue != w || !ok && f.DefValue != "" {
			t.Errorf("-%s is %q by default, want %q", f.Name, f.DefValue, w)
		}
	})
}

func TestWaysToWriteAFlag(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"-conn-limit", "7", "-retry-on-http-422"},
		{"--conn-limit", "7", "--retry-on-http-422"},
		{"-conn-limit=7", "-retry-on-http-422=true"},
		{"--conn-limit=7", "--retry-on-http-422=1"},
		{"-conn-limit=8", "-retry-on-http-422", "-conn-limit=7"},
	} {
		if c := parse(t, args...); c.connLimit != 7 || !c.retry.on422 {
			t.Errorf("%q: conn limit %d, retry on 422 %v", args, c.connLimit, c.retry.on422)
		}
	}
}

// Not parallel: it changes the environment.
func TestEnvironment(t *testing.T) {
	for name, value := range map[string]string{
		"CONN_LIMIT": "7", "MAX_BODY_SIZE": "1KiB", "RETRY_ON_HTTP_429": "false", "ADMIN_ADDRESS": "",
		"DELIVERY_TIMEOUT": "3s", "FORWARD_HEADER": "x-one\nX-Two\n", "NO_SUCH_FLAG": "x",
		"UPSTREAM": "\r\nhttp://a.example,name=a\r\n  \n\thttp://b.example/p/,required=false\n",
	} {
		t.Setenv("PYROSCOPE_RELAY_"+name, value)
	}
	c, err := parseConfig([]string{"-conn-limit", "16384", "-delivery-timeout=4s"})
	if err != nil {
		t.Fatal(err)
	}
	if c.connLimit != 16384 || c.deliveryTimeout != 4*time.Second {
		t.Errorf("conn limit %d, delivery timeout %v: the flags given must win", c.connLimit, c.deliveryTimeout)
	}
	if c.maxBody != kib || c.retry.on429 || c.adminAddress != "" {
		t.Errorf("max body %d, retry on 429 %v, admin %q: not those of the environment", c.maxBody, c.retry.on429, c.adminAddress)
	}
	if !slices.Contains(c.forward, "X-One") || !slices.Contains(c.forward, "X-Two") {
		t.Errorf("forwarded are %q", c.forward)
	}
	if len(c.upstreams) != 2 || c.upstreams[0].label() != "a" || c.upstreams[1].label() != "http://b.example/p" || c.upstreams[1].required {
		t.Errorf("upstreams %+v", c.upstreams)
	}
	c, err = parseConfig([]string{"-upstream", "log:"})
	if err != nil || len(c.upstreams) != 1 {
		t.Errorf("%d upstreams, %v: one given as a flag replaces those of the environment", len(c.upstreams), err)
	}
}

func TestFaultsInTheEnvironment(t *testing.T) {
	t.Parallel()
	for variable, value := range map[string]string{
		"CONN_LIMIT": "abc", "LISTEN_PORT": "65536", "LOG_LEVEL": "loud", "MAX_BODY_SIZE": "1GiB", "RETRY_ON_HTTP_422": "maybe",
		"UPSTREAM": "log:\nhttp://user:" + planted + "@a.example", "FORWARD_HEADER": "Via", "DELIVERY_TIMEOUT": "30s",
		"MIN_BACKOFF_PERIOD": "6m", "ADMIN_ADDRESS": "8081", "REMOTE_TIMEOUT": "",
	} {
		t.Run(variable, func(t *testing.T) {
			t.Parallel()
			name := "PYROSCOPE_RELAY_" + variable
			args := []string{"-check"}
			if variable != "UPSTREAM" {
				args = append(args, "-upstream", "log:")
			}
			p, code := runProgram(t, []string{name + "=" + value}, args...)
			errs := p.stderr.String()
			dashed := "-" + strings.ToLower(strings.ReplaceAll(variable, "_", "-"))
			if code != exitUsage || strings.Count(errs, name) != 1 || !strings.Contains(errs, dashed) || strings.Contains(errs, planted) {
				t.Errorf("exit code %d: %s", code, errs)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-h"}, {"-conn-limit", "7", "--help"}} {
		p, code := runProgram(t, []string{
			"PYROSCOPE_RELAY_UPSTREAM=http://u:" + planted + "@a.example", "PYROSCOPE_RELAY_TLS_KEY_PEM=" + planted,
			"PYROSCOPE_RELAY_CONN_LIMIT=" + planted,
		}, args...)
		out := p.stdout.String()
		if code != exitOK || p.stderr.String() != "" || strings.Contains(out, planted) {
			t.Errorf("exit code %d:\n%s%s", code, out, p.stderr.String())
		}
		headings := 0
		for _, o := range defaults().options() {
			if o.value == nil {
				headings++
				if !strings.Contains(out, "\n\n"+o.name+"\n") {
					t.Errorf("no heading %q", o.name)
				}
			} else if strings.Count(out, "\n  -"+o.name+" ") != 1 {
				t.Errorf("-%s is not listed once", o.name)
			}
		}
		if headings < 3 {
			t.Errorf("%d groups of flags", headings)
		}
		if !strings.Contains(out, "(default 16384)") {
			t.Error("no defaults")
		}
	}
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	_, port, _ := net.SplitHostPort(busy.Addr().String())
	onBusy := []string{"-listen-address", "127.0.0.1", "-listen-port", port, "-admin-address", ""}
	for _, test := range []struct {
		args   []string
		code   int
		stdout string // all of it
		stderr string // a part
	}{
		{[]string{"-check", "-upstream", "log:"}, exitOK, "ok\n", ""},
		{[]string{"-version"}, exitOK, "pyroscope-relay ", ""},
		{nil, exitUsage, "", "-upstream"},
		{[]string{"-check"}, exitUsage, "", "-upstream"},
		{[]string{"-upstream", "log:", "-no-such-flag"}, exitUsage, "", "-no-such-flag"},
		{[]string{"-upstream", "log:", "-check", "leftover"}, exitUsage, "", "leftover"},
		{append([]string{"-upstream", "log:"}, onBusy...), exitFailed, "", "-listen-port"},
		{[]string{"-upstream", "log:", "-listen-address", "127.0.0.1", "-listen-port", "0", "-admin-address", busy.Addr().String()}, exitFailed, "", "-admin-address"},
		{append([]string{"-upstream", "log:", "-log-level", "loud"}, onBusy...), exitUsage, "", "-log-level"},
		{append([]string{"-upstream", "log:", "-check"}, onBusy...), exitOK, "ok\n", ""},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			p, code := runProgram(t, nil, test.args...)
			out, errs := p.stdout.String(), p.stderr.String()
			if code != test.code || !strings.Contains(errs, test.stderr) || test.stderr == "" && errs != "" {
				t.Errorf("exit code %d, want %d: %s", code, test.code, errs)
			}
			if !strings.HasPrefix(out, test.stdout) || test.stdout == "" && out != "" {
				t.Errorf("standard output %q, want %q", out, test.stdout)
			}
			if test.code == exitUsage && strings.Contains(errs, "in use") {
				t.Error("it tried to listen before it had read its flags")
			}
		})
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	p, code := runProgram(t, nil, "-version")
	if want := regexp.MustCompile(`^pyroscope-relay \S+ ` + regexp.QuoteMeta(runtime.Version()) + `\S* commit \S+\n$`); code != 0 || !want.MatchString(p.stdout.String()) {
		t.Errorf("exit code %d: %q", code, p.stdout.String())
	}
}

// One run reports every fault, each on a line that names its flag, and no flag twice.
func TestFaultsAreReportedTogether(t *testing.T) {
	t.Parallel()
	args := []string{
		"-conn-limit", "abc", "-no-such-flag", "leftover", "-listen-port", "70000", "-delivery-timeout", "x", "-log-level", "loud",
		"-log-format", "xml", "-max-body-size", "5TB", "-retry-on-http-422=maybe", "-remote-timeout", "0s",
		"-min-backoff-period", "10m", "-admin-address", "nowhere", "-forward-header", "Via", "-listen-address", "127.0.0.1:80",
		"-upstream", "ftp://a.example", "-upstream", "http://b.example,name=,bogus=1", "-max-backoff-retries", "-1",
		"-upstream", "http://c.example/path", "-upstream", "http://c.example/path", "---wrong",
	}
	got := faultsOf(t, args...)
	for _, part := range []string{
		"-conn-limit", "-no-such-flag", `"leftover"`, "-listen-port", "-delivery-timeout", "-log-level", "-log-format",
		"-max-body-size", "-retry-on-http-422", "-remote-timeout", "-min-backoff-period", "-admin-address", "-forward-header",
		"-listen-address", "-upstream number 1", "-upstream number 2: option name", "-upstream number 2: option number 2", "-max-backoff-retries",
		"-upstream number 4", "---wrong",
	} {
		naming := slices.DeleteFunc(slices.Clone(got), func(line string) bool { return !strings.Contains(line, part) })
		if len(naming) != 1 {
			t.Errorf("%s is named by %d lines, want 1: %q", part, len(naming), naming)
		}
	}
	if len(got) != 20 || strings.Contains(strings.Join(got, "\n"), "c.example") {
		t.Errorf("%d faults, want 20 that repeat no URL:\n%s", len(got), strings.Join(got, "\n"))
	}
}

func TestValuesThatAreRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, value string }{
		{"conn-limit", "-1"}, {"conn-limit", ""}, {"conn-limit", "1.5"}, {"conn-limit", "99999999999999999999"},
		{"listen-port", "-1"}, {"listen-port", "65536"}, {"listen-port", "http"},
		{"listen-address", "127.0.0.1:8080"}, {"listen-address", "[::1]"}, {"listen-address", "a b"}, {"listen-address", "http://a"},
		{"admin-address", "8081"}, {"admin-address", "127.0.0.1:65536"}, {"admin-address", "127.0.0.1:"}, {"admin-address", "::1"},
		{"server-read-timeout", "-1s"}, {"server-read-timeout", "30"}, {"server-idle-timeout", "-1ns"}, {"server-write-timeout", ""},
		{"delivery-timeout", "0s"}, {"delivery-timeout", "-1s"}, {"shutdown-delay", "-1s"}, {"shutdown-timeout", "soon"}, {"shutdown-timeout", "0s"},
		{"remote-timeout", "0"}, {"min-backoff-period", "0"}, {"max-backoff-period", "-1s"}, {"max-backoff-retries", "-1"},
		{"max-body-size", "0"}, {"max-body-size", "-1"}, {"max-inflight-bytes", "1"},
		{"log-level", ""}, {"log-level", "info+1"}, {"log-format", "text"},
		{"forward-header", ""}, {"forward-header", "A B"}, {"forward-header", "Connection"}, {"forward-header", "transfer-encoding"},
		{"forward-header", "host"}, {"forward-header", "X-Forwarded-*"},
	} {
		got := faultsOf(t, "-upstream", "log:", "-"+test.name, test.value)
		if len(got) != 1 || !strings.Contains(got[0], "-"+test.name) {
			t.Errorf("-%s %q: %q", test.name, test.value, got)
		}
	}
}

func TestValuesThatAreTaken(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"-conn-limit", "0"}, {"-listen-port", "0"}, {"-listen-port", "65535"}, {"-listen-address", "::1"}, {"-listen-address", "fe80::1%eth0"},
		{"-listen-address", "localhost"}, {"-admin-address", "[::1]:0"}, {"-admin-address", ":8081"}, {"-server-read-timeout", "0"},
		{"-max-backoff-retries", "0"}, {"-log-level", "debug"}, {"-log-level", "warn"}, {"-log-level", "error"}, {"-log-format", "json"},
		{"-forward-header", "authorization"}, {"-shutdown-delay", "5s"},
	} {
		parse(t, args...)
	}
}

func TestRelationsBetweenFlags(t *testing.T) {
	t.Parallel()
	parse(t, "-max-body-size", "256MiB", "-max-inflight-bytes", "256MiB")
	parse(t, "-delivery-timeout", "30s", "-server-write-timeout", "30001ms")
	parse(t, "-delivery-timeout", "1h", "-server-write-timeout", "0")
	parse(t, "-min-backoff-period", "1s", "-max-backoff-period", "1s")
	for _, args := range [][]string{
		{"-max-body-size", "268435457", "-max-inflight-bytes", "256MiB"},
		{"-delivery-timeout", "30s", "-server-write-timeout", "30s"},
		{"-min-backoff-period", "1001ms", "-max-backoff-period", "1s"},
	} {
		got := faultsOf(t, append(args, "-upstream", "log:")...)
		if len(got) != 1 || !strings.Contains(got[0], args[0]) || !strings.Contains(got[0], args[2]) {
			t.Errorf("%q: %q", args, got)
		}
	}
}

func TestByteSizes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]byteSize{
		"0": 0, "1": 1, "1023": 1023, "1KiB": 1 << 10, "1KB": 1000, "1MiB": 1 << 20, "1MB": 1e6, "1GiB": 1 << 30, "1GB": 1e9,
		"4611686018427387904": 1 << 62, "4294967296GiB": 1 << 62, "4611686018GB": 4611686018e9,
	} {
		var b byteSize
		if err := b.Set(text); err != nil || b != want {
			t.Errorf("%q is %d, %v; want %d", text, b, err, want)
		}
	}
	for _, text := range []string{
		"", "KiB", "-1", "-1KiB", "1.5GiB", "5TB", "5K", "5kib", "5 MiB", "MiB5", "0x10", "1_000", "4611686018427387905", "4294967297GiB",
		"4611686019GB", "99999999999999999999",
	} {
		b := byteSize(7)
		if err := b.Set(text); err == nil || b != 7 {
			t.Errorf("%q was taken as %d", text, b)
		}
	}
}

func FuzzByteSize(f *testing.F) {
	for _, seed := range []string{"64MiB", "1GB", "-1", "9223372036854775807GiB", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var b, again byteSize
		if b.Set(text) != nil {
			return
		}
		if b < 0 || b > math.MaxInt64/2 {
			t.Fatalf("%q is %d", text, b)
		}
		if err := again.Set(b.String()); err != nil || again != b {
			t.Fatalf("%q is %d, printed as %s, read back as %d, %v", text, b, &b, again, err)
		}
	})
}

func TestUpstreamSyntax(t *testing.T) {
	t.Parallel()
	base := defaults().retry
	for _, test := range []struct {
		spec, label string
		check       func(u upstreamConfig) bool
	}{
		{"log:", "log:", func(u upstreamConfig) bool { return u.url == nil && u.required && u.retry == base }},
		{"log:,name=x,required=false", "x", func(u upstreamConfig) bool { return !u.required }},
		{"http://a.example", "http://a.example", func(u upstreamConfig) bool { return u.url.Path == "" && u.required }},
		{"https://a.example:4040/", "https://a.example:4040", func(u upstreamConfig) bool { return u.url.Path == "" }},
		{"http://[::1]:4040/p/q//", "http://[::1]:4040/p/q", func(u upstreamConfig) bool { return u.url.Path == "/p/q" }},
		{"http://a/p%2Fq/", "http://a/p%2Fq", func(u upstreamConfig) bool { return u.url.EscapedPath() == "/p%2Fq" }},
		{"http://a,name=prod", "prod", func(u upstreamConfig) bool { return u.name == "prod" }},
		{`http://a,"name=a, ""b"""`, `a, "b"`, func(u upstreamConfig) bool { return true }},
		{"http://a,header=X-A: 1,header=x-a:2", "http://a", func(u upstreamConfig) bool { return slices.Equal(u.header["X-A"], []string{"1", "2"}) }},
		{`http://a,"header=X-A: 1, 2=3"`, "http://a", func(u upstreamConfig) bool { return u.header.Get("X-A") == "1, 2=3" }},
		{"http://a,header=X-A:", "http://a", func(u upstreamConfig) bool { return len(u.header["X-A"]) == 1 && u.header["X-A"][0] == "" }},
		{"http://a,remote-timeout=1s,min-backoff-period=2ms,max-backoff-period=3s,max-backoff-retries=4,retry-on-http-429=false,retry-on-http-422=true",
			"http://a", func(u upstreamConfig) bool {
				return u.retry == retryPolicy{timeout: time.Second, minBackoff: 2 * time.Millisecond, maxBackoff: 3 * time.Second, retries: 4, on422: true}
			}},
	} {
		u, err := parseUpstream(test.spec, base)
		if err != nil || u.label() != test.label || !test.check(u) {
			t.Errorf("%s: label %q, %+v, %v", test.spec, u.label(), u, err)
		}
	}
}

// Every fault says which upstream it is about and never repeats what may be a secret.
func TestUpstreamFaults(t *testing.T) {
	t.Parallel()
	for spec, want := range map[string]string{
		"":                                                  "CSV",
		"a.example:4040":                                    "URL",
		"ftp://a.example":                                   "http://",
		"http://":                                           "host",
		"http://:4040":                                      "host",
		"http://a:99999":                                    "port",
		"http://a b":                                        "URL",
		"http://user:" + planted + "@a.example":             "user",
		"http://" + planted + "@a.example":                  "user",
		"http://a?token=" + planted:                         "query",
		"http://a?":                                         "query",
		"http://a#" + planted:                               "fragment",
		"http://a#":                                         "fragment",
		"http://a," + planted:                               "option number 1",
		"http://a,name=x," + planted + "=1":                 "option number 2",
		"http://a,":                                         "option number 1",
		"http://a, name=x":                                  "option number 1",
		"http://a,NAME=x":                                   "option number 1",
		"http://a,password=" + planted:                      "option number 1",
		"http://a,name=":                                    "option name",
		"http://a,\"name=x\ny\"":                            "option name",
		"http://a,name=x,name=y":                            "option name is given twice",
		"http://a,required=" + planted:                      "option required",
		"http://a,remote-timeout=" + planted:                "option remote-timeout",
		"http://a,remote-timeout=-1s":                       "option remote-timeout",
		"http://a,remote-timeout=0s":                        "remote-timeout",
		"http://a,max-backoff-retries=-1":                   "option max-backoff-retries",
		"http://a,max-backoff-period=1ms":                   "max-backoff-period",
		"http://a,retry-on-http-429=" + planted:             "option retry-on-http-429",
		"http://a,header=" + planted:                        "option header",
		"http://a,header=Bearer " + planted + ":x":          "option header",
		"http://a,header=: " + planted:                      "option header",
		"http://a,header=Content-Length: 1":                 "Content-Length",
		"http://a,\"header=X-A: " + planted + "\x01\"":      "control character",
		"http://a,\"header=X-A: " + planted + "\r\nX-B:1\"": "control character",
		"http://a,\"header=X-A: " + planted:                 "CSV",
		"http://a,header=X-A: \"" + planted + "\"":          "CSV",
		"http://a\nhttp://" + planted:                       "more than one line",
		"log:,header=X-A: 1":                                "log:",
		"log:,remote-timeout=1s":                            "log:",
	} {
		got := faultsOf(t, "-upstream", "http://first.example", "-upstream", spec)
		if len(got) != 1 || !strings.HasPrefix(got[0], "-upstream number 2: ") || !strings.Contains(got[0], want) {
			t.Errorf("%q: %q, want %q", spec, got, want)
		}
	}
	for _, pair := range [][2]string{
		{"http://a", "http://a/"}, {"http://a,name=x", "http://b,name=x"}, {"http://a", "http://b,name=http://a"}, {"log:", "log:"},
	} {
		got := faultsOf(t, "-upstream", pair[0], "-upstream", pair[1])
		if len(got) != 1 || !strings.HasPrefix(got[0], "-upstream number 2: another upstream") {
			t.Errorf("%q: %q", pair, got)
		}
	}
}

func FuzzParseUpstream(f *testing.F) {
	for _, seed := range []string{
		"log:", "http://a.example", "https://a:1/p,name=x,required=false", `http://a,"header=A: b,c",header=D: e`,
		"http://u:p@a", "http://a?b", "http://a,remote-timeout=1s,max-backoff-retries=2",
	} {
		f.Add(seed, "")
		f.Add("", seed)
		f.Add(seed+",", "=1")
	}
	f.Fuzz(func(t *testing.T, before, after string) {
		u, err := parseUpstream(before+planted+after, defaults().retry)
		if err != nil {
			if strings.Contains(err.Error(), planted) {
				t.Fatalf("a secret was repeated: %v", err)
			}
			return
		}
		if u.label() == "" || strings.ContainsAny(u.label(), "\r\n") {
			t.Fatalf("label %q", u.label())
		}
		if u.url != nil && (u.url.User != nil || u.url.RawQuery != "" || u.url.Host == "" || !strings.HasPrefix(u.url.Scheme, "http")) {
			t.Fatalf("URL %q", u.url)
		}
		if u.retry.timeout <= 0 || u.retry.minBackoff <= 0 || u.retry.maxBackoff < u.retry.minBackoff || u.retry.retries < 0 {
			t.Fatalf("retries %+v", u.retry)
		}
		for name, values := range u.header {
			if !isHeaderName(name) || strings.ContainsAny(strings.Join(values, ""), "\r\n\x00") {
				t.Fatalf("header %q: %q", name, values)
			}
		}
	})
}

func TestLogFormats(t *testing.T) {
	t.Parallel()
	p := command(t, nil, "-upstream", "log:", "-listen-address", "127.0.0.1", "-listen-port", "0", "-admin-address", "", "-log-format", "json")
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the relay listens", func() bool { return strings.Contains(p.stderr.String(), `"listening"`) })
	p.cmd.Process.Signal(os.Interrupt)
	p.cmd.Wait()
	for line := range strings.Lines(p.stderr.String()) {
		var record struct{ Time, Level, Msg string }
		if err := json.Unmarshal([]byte(line), &record); err != nil || record.Time == "" || record.Level == "" || record.Msg == "" {
			t.Errorf("%v: %s", err, line)
		}
	}

	quiet := start(t, "-upstream", "log:", "-log-level", "info")
	post(t, newClient(t, "HTTP/1.1"), quiet.url("/ingest?name=a"), []byte("x"))
	quiet.stop(t)
	for line := range strings.Lines(quiet.stderr.String()) {
		if !strings.HasPrefix(line, "time=") || !strings.Contains(line, " level=INFO msg=") {
			t.Errorf("not logfmt, or not of level info: %s", line)
		}
	}
	if quiet.stdout.String() != "" {
		t.Errorf("standard output: %s", quiet.stdout.String())
	}
}

func TestLogLevels(t *testing.T) {
	t.Parallel()
	for level, lines := range map[string][]string{"debug": {"DEBUG", "INFO", "WARN", "ERROR"}, "warn": {"WARN", "ERROR"}, "error": {"ERROR"}} {
		var out bytes.Buffer
		l := newLogger(&out, parse(t, "-log-level", level))
		l.Debug("x")
		l.Info("x")
		l.Warn("x")
		l.Error("x")
		var got []string
		for line := range strings.Lines(out.String()) {
			got = append(got, strings.TrimPrefix(strings.Fields(line)[1], "level="))
		}
		if !slices.Equal(got, lines) {
			t.Errorf("%s: %q", level, got)
		}
	}
}

// table is the rows of the Markdown table below a heading of the README, by their first cell, without its backquotes.
func table(t testing.TB, heading string) map[string][]string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(readme), "\n"+heading+"\n")
	if !ok {
		t.Fatalf("README.md has no heading %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n#")
	rows := map[string][]string{}
	for line := range strings.Lines(section) {
		if cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|"); strings.HasPrefix(line, "| `") {
			for i := range cells {
				cells[i] = strings.Trim(strings.TrimSpace(cells[i]), "`")
			}
			if rows[cells[0]] != nil {
				t.Errorf("README.md has %s twice", cells[0])
			}
			rows[cells[0]] = cells
		}
	}
	return rows
}

// sameKeys compares what the README lists with what the program has.
func sameKeys(t testing.TB, what string, readme, program []string) {
	t.Helper()
	slices.Sort(readme)
	slices.Sort(program)
	for _, name := range program {
		if !slices.Contains(readme, name) {
			t.Errorf("README.md lacks the %s %s", what, name)
		}
	}
	for _, name := range readme {
		if !slices.Contains(program, name) {
			t.Errorf("README.md has the %s %s, which the program has not", what, name)
		}
	}
}

func TestReadmeListsTheFlags(t *testing.T) {
	t.Parallel()
	rows := table(t, "### Flags")
	c := parse(t)
	var names []string
	for _, o := range c.options() {
		if o.value == nil {
			continue
		}
		names = append(names, "-"+o.name)
		row := rows["-"+o.name]
		if row == nil {
			continue
		}
		f := c.flags.Lookup(o.name)
		if want := f.DefValue; row[1] != "" || want != "" {
			if err := f.Value.Set(row[1]); err != nil || f.Value.String() != want {
				t.Errorf("README.md says -%s is %q by default, it is %q", o.name, row[1], want)
			}
		}
	}
	sameKeys(t, "flag", slices.Collect(maps.Keys(rows)), names)
}

// The options of -upstream are taken from -h: a name or a list of names, two spaces or more, the rest.
func TestReadmeListsTheUpstreamOptions(t *testing.T) {
	t.Parallel()
	var usage bytes.Buffer
	parse(t).printUsage(&usage)
	_, section, ok := strings.Cut(usage.String(), "\nOptions of -upstream")
	if !ok {
		t.Fatal("-h has no such section")
	}
	var names []string
	for line := range strings.Lines(section) {
		list, ok := strings.CutPrefix(line, "  ")
		list, _, _ = strings.Cut(list, "  ")
		for name := range strings.SplitSeq(strings.TrimSpace(list), ",") {
			if name = strings.TrimSpace(name); ok && name != "" {
				names = append(names, name)
				_, err := parseUpstream("http://a.example,"+name+"=", defaults().retry)
				if err != nil && strings.Contains(err.Error(), errNoOption.Error()) {
					t.Errorf("-h has the option %s, which does not exist", name)
				}
			}
		}
	}
	sameKeys(t, "option", slices.Collect(maps.Keys(table(t, "### Options of `-upstream`"))), names)
}

func TestReadmeExamplesParse(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	examples := regexp.MustCompile(`(?m)^(?:go run \.|\./pyroscope-relay) (.+)$`).FindAllStringSubmatch(string(readme), -1)
	if len(examples) == 0 {
		t.Fatal("no examples")
	}
	for _, e := range examples {
		line, _, _ := strings.Cut(e[1], " #")
		args := strings.Fields(strings.NewReplacer("'", "", "&", "").Replace(line))
		if _, err := parseConfig(args); err != nil {
			t.Errorf("%s: %v", e[0], err)
		}
	}
	if want := fmt.Sprintf("localhost:%d/ingest", defaults().listenPort); !strings.Contains(string(readme), want) {
		t.Errorf("no example posts to %s", want)
	}
}
