package main

// What relaying one body costs, from a client's write to its answer, over real sockets of this host:
//
//	go test -run '^$' -bench . -benchtime 2s
//
// Clients and upstreams are part of the process, but allocate nothing (those of gRPC do): bytes and allocations per
// operation are the relay's.

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"testing"
)

// startHere runs the relay in this process, with its default limits, until the benchmark ends.
func startHere(b *testing.B, upstreams int) (addr string) {
	b.Helper()
	args := []string{"-listen-address", "127.0.0.1", "-listen-port", "0", "-admin-address", ""}
	for range upstreams {
		args = append(args, "-upstream", newSink(b))
	}
	c, err := parseConfig(args)
	if err != nil {
		b.Fatal(err)
	}
	r := newRelay(c, slog.New(slog.DiscardHandler))
	if err := r.listen(b.Context()); err != nil {
		b.Fatal(err)
	}
	ended := make(chan int)
	go func() { ended <- r.serve(b.Context()) }()
	b.Cleanup(func() {
		if code := <-ended; code != exitOK {
			b.Errorf("the relay ended with %d", code)
		}
	})
	return r.conns.Addr().String()
}

// newSink is the URL of an upstream that reads bodies and says what Pyroscope says.
func newSink(b *testing.B) string {
	server := newRawServer(b, func(c *net.TCPConn, br *bufio.Reader, _ int) {
		for {
			h, err := readLean(br)
			if err != nil {
				return
			}
			answer := "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
			if h.json {
				answer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
			} else if h.proto {
				answer = "HTTP/1.1 200 OK\r\nContent-Type: application/proto\r\nContent-Length: 0\r\n\r\n"
			}
			if _, err := io.WriteString(c, answer); err != nil {
				return
			}
		}
	})
	return server.url()
}

// A leanHead is what sinks and clients look at.
type leanHead struct {
	first       [12]byte
	json, proto bool
}

// readLean reads one request or answer and throws its body away.
func readLean(br *bufio.Reader) (h leanHead, err error) {
	length := 0
	for i := 0; ; i++ {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return h, err
		}
		line = bytes.TrimRight(line, "\r\n")
		switch {
		case i == 0:
			copy(h.first[:], line)
		case len(line) == 0:
			_, err := br.Discard(length)
			return h, err
		case bytes.HasPrefix(line, []byte("Content-Length: ")):
			if length, err = strconv.Atoi(string(line[len("Content-Length: "):])); err != nil {
				return h, err
			}
		case bytes.HasPrefix(line, []byte("Content-Type: application/")):
			h.json, h.proto = bytes.HasSuffix(line, []byte("json")), bytes.HasSuffix(line, []byte("proto"))
		}
	}
}

// benchmark sends one body after another on one connection.
func benchmark(b *testing.B, addr, path, contentType string, body []byte) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	request := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: relay\r\nUser-Agent: bench\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", path, contentType, len(body), body)
	br := bufio.NewReader(c)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(request); err != nil {
			b.Fatal(err)
		}
		if h, err := readLean(br); err != nil || string(h.first[:]) != "HTTP/1.1 200" {
			b.Fatalf("%q, %v", h.first, err)
		}
	}
}

func BenchmarkIngest(b *testing.B) {
	for name, size := range map[string]int{"5.6KB": 5720, "64KiB": 64 << 10, "1MiB": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			benchmark(b, startHere(b, 2), "/ingest?name=bench", "application/octet-stream", make([]byte, size))
		})
	}
}

func BenchmarkUpstreams(b *testing.B) {
	for _, n := range []int{1, 2, 4, 8} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			benchmark(b, startHere(b, n), "/ingest?name=bench", "application/octet-stream", make([]byte, 64<<10))
		})
	}
}

func BenchmarkPush(b *testing.B) {
	message := make([]byte, 64<<10)
	envelope := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	for _, p := range []struct {
		contentType string
		body        []byte
	}{
		{"application/proto", message}, {"application/json", message},
		{"application/grpc-web+proto", envelope}, {"application/grpc-web+json", envelope},
	} {
		b.Run(p.contentType, func(b *testing.B) {
			benchmark(b, startHere(b, 2), pushPath, p.contentType, p.body)
		})
	}
	for _, contentType := range []string{"application/grpc+proto", "application/grpc+json"} {
		b.Run(contentType, func(b *testing.B) {
			addr, client := startHere(b, 2), newClient(b, "h2c")
			b.SetBytes(int64(len(envelope)))
			b.ReportAllocs()
			for b.Loop() {
				resp := post(b, client, "http://"+addr+pushPath, envelope, "Content-Type", contentType, "Te", "trailers")
				if resp.StatusCode != http.StatusOK || resp.Trailer.Get("Grpc-Status") != "0" {
					b.Fatalf("status %d, grpc-status %q", resp.StatusCode, resp.Trailer.Get("Grpc-Status"))
				}
			}
		})
	}
}
