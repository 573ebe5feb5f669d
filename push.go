package main

// POST /push.v1.PusherService/Push in, payload out: Connect unary, gRPC and gRPC-Web, over any HTTP version. Whatever the
// client speaks, one Connect unary POST goes upstream with the message's own bytes; the client is answered in its own
// protocol. The message itself is never decoded.
//
// Connect: https://connectrpc.com/docs/protocol
// gRPC: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
// gRPC-Web: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-WEB.md

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// pushPath is the procedure's path, here and upstream: the same in all three protocols, which regard case.
const pushPath = "/push.v1.PusherService/Push"

// The gRPC envelope: one byte of flags, four of length (big endian), then the message (PROTOCOL-HTTP2,
// Length-Prefixed-Message).
const (
	envelopePrefix = 5
	flagCompressed = 0x01 // the message is in grpc-encoding
	flagTrailers   = 0x80 // gRPC-Web answers only
)

// acceptPost lists what the route takes, for 415 answers: exactly what recognise takes, but for case.
const acceptPost = "application/grpc, application/grpc+json, application/grpc+json; charset=utf-8, application/grpc+proto, " +
	"application/grpc-web, application/grpc-web+json, application/grpc-web+json; charset=utf-8, application/grpc-web+proto, " +
	"application/json, application/json; charset=utf-8, application/proto"

// protocol is what a client of the route speaks.
type protocol int

const (
	connect         protocol = iota // unary
	grpc                            // over HTTP/1.1 too
	grpcWeb                         // in binary: grpc-web-text is not served
	unknownProtocol                 // none of these
)

// A call is one POST to Push. It is made from the head alone and belongs to the goroutine that serves the request.
type call struct {
	protocol    protocol      // unknownProtocol: refuse is all that may be called
	contentType string        // of the request, and of a successful answer
	codec       string        // content type of the message in Connect unary
	encoding    string        // grpc-encoding; "" = identity
	query       string        // raw; the procedure has none, but a client's base URL may
	deadline    time.Duration // valid if timed
	timed       bool
}

// beginPush reads a request's head. A Connect call needs no Connect header, only a content type: many agents send none.
// A version other than 1 is refused, and so is a deadline that cannot be read, is given twice, or leaves no time.
func beginPush(r *http.Request) (exchange, *fault) {
	c := &call{protocol: unknownProtocol, query: r.URL.RawQuery}
	if !c.recognise(r.Header["Content-Type"]) {
		return c, &fault{status: http.StatusUnsupportedMediaType, code: codeUnimplemented, reason: rejectProtocol,
			public: "this content type is not served here; Accept-Post lists those that are"}
	}
	c.encoding = r.Header.Get("Grpc-Encoding")
	name, parse := "Grpc-Timeout", parseGRPCTimeout
	if c.protocol == connect {
		name, parse = "Connect-Timeout-Ms", parseConnectTimeout
		if v := r.Header["Connect-Protocol-Version"]; v != nil && v[0] != "1" {
			return c, badRequest(rejectProtocol, "Connect-Protocol-Version must be 1")
		}
	}
	v := r.Header[name]
	if v == nil {
		return c, nil
	}
	d, ok := parse(v[0])
	switch {
	case !ok || len(v) > 1:
		return c, badRequest(rejectProtocol, name+" cannot be read as a timeout")
	case d <= 0:
		return c, &fault{status: http.StatusGatewayTimeout, code: codeDeadlineExceeded, reason: rejectProtocol, transient: true,
			public: name + " left no time"}
	}
	c.deadline, c.timed = d, true
	return c, nil
}

// recognise reads the request's Content-Type; false if the route does not serve it. RFC 9110, section 8.3.1: types and
// parameter names do not regard case. The only parameter served is charset=utf-8, of JSON. c.contentType is set in
// either case, unless the header is missing or there are several: refuse looks for gRPC in it.
func (c *call) recognise(contentType []string) bool {
	if len(contentType) != 1 {
		return false
	}
	c.contentType = strings.ToLower(contentType[0])
	t, params, err := mime.ParseMediaType(c.contentType)
	if err != nil {
		return false
	}
	p := unknownProtocol
	c.codec = "application/proto"
	switch t {
	case "application/proto", "application/json":
		p, c.codec = connect, t
	case "application/grpc", "application/grpc+proto":
		p = grpc
	case "application/grpc-web", "application/grpc-web+proto":
		p = grpcWeb
	case "application/grpc+json":
		p, c.codec = grpc, "application/json"
	case "application/grpc-web+json":
		p, c.codec = grpcWeb, "application/json"
	}
	charset, named := params["charset"]
	if len(params) > 1 || len(params) == 1 && !(named && c.codec == "application/json" && charset == "utf-8") {
		return false
	}
	c.protocol, c.contentType = p, t
	return p != unknownProtocol
}

func (c *call) timeout() (time.Duration, bool) { return c.deadline, c.timed }

// parseConnectTimeout reads a Connect-Timeout-Ms: at most ten characters of milliseconds. The result may be zero or
// negative. Connect protocol, Timeout-Milliseconds: only positive ones are valid.
func parseConnectTimeout(s string) (time.Duration, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return time.Duration(n) * time.Millisecond, err == nil && len(s) <= 10
}

// parseGRPCTimeout reads a grpc-timeout: at most eight digits and a unit (PROTOCOL-HTTP2, Timeout). The result may be
// zero or, though the protocol has no such thing, negative; one beyond what time.Duration holds is as long as that.
func parseGRPCTimeout(s string) (time.Duration, bool) {
	if s == "" {
		return 0, false
	}
	unit, ok := map[byte]time.Duration{
		'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond,
	}[s[len(s)-1]]
	digits, negative := strings.CutPrefix(s[:len(s)-1], "-")
	n, err := strconv.ParseUint(digits, 10, 32)
	if !ok || err != nil || len(digits) > 8 {
		return 0, false
	}
	d := time.Duration(math.MaxInt64)
	if time.Duration(n) <= d/unit {
		d = time.Duration(n) * unit
	}
	if negative {
		d = -d
	}
	return d, true
}

// payload makes a Connect unary request of the call, whatever its protocol. It changes header. The payload's body is
// body, or the message in it: no bytes are copied.
//
// A message that is flagged as compressed without a compression is answered with INTERNAL: gRPC, doc/compression.md.
func (c *call) payload(header http.Header, body []byte) (*payload, *fault) {
	if c.protocol != connect {
		message, compressed, f := openEnvelope(body)
		if f != nil {
			return nil, f
		}
		body = message
		delete(header, "Content-Encoding") // it would be that of the whole body, envelope and all
		if compressed {
			if c.encoding == "" || c.encoding == "identity" {
				return nil, &fault{status: http.StatusBadRequest, code: codeInternal, reason: rejectProtocol,
					public: "the message is flagged as compressed, but grpc-encoding names no compression"}
			}
			header["Content-Encoding"] = []string{c.encoding}
		}
		header["Content-Type"] = []string{c.codec}
	}
	if header["Content-Type"] == nil {
		header["Content-Type"] = []string{c.codec} // nominated by Connection, but nothing goes without it
	}
	delete(header, "Connect-Timeout-Ms") // the fan-out says how much of it is left
	header["Connect-Protocol-Version"] = []string{"1"}
	// Without it an upstream may answer in the encoding of the request (Connect protocol, Unary-Request), and the
	// answer is passed on to clients that were never asked what they can read.
	header["Accept-Encoding"] = []string{"identity"}
	return &payload{route: routePush, query: c.query, header: header, body: body}, nil
}

// openEnvelope returns the one message in a gRPC request body, which shares its bytes; it may be empty. compressed is
// what the envelope says. Nothing is allocated from the length in the prefix: it is only compared.
func openEnvelope(body []byte) (message []byte, compressed bool, f *fault) {
	if len(body) < envelopePrefix {
		return nil, false, badRequest(rejectProtocol, "the gRPC message prefix is cut short: five bytes are needed")
	}
	flags, message := body[0], body[envelopePrefix:]
	length := binary.BigEndian.Uint32(body[1:envelopePrefix])
	switch { // lengths are compared as uint64: an int may have 32 bits
	case flags&^flagCompressed != 0:
		return nil, false, badRequest(rejectProtocol, fmt.Sprintf("the gRPC message has unknown flags: 0x%02x", flags))
	case uint64(length) > uint64(len(message)):
		return nil, false, badRequest(rejectProtocol, "the gRPC message is shorter than its prefix says")
	case uint64(length) < uint64(len(message)):
		return nil, false, badRequest(rejectProtocol, "there are bytes after the gRPC message: a unary call has exactly one")
	}
	return message, flags&flagCompressed != 0, nil
}

// accept answers with the upstream's own message. gRPC has its status in trailers; gRPC-Web, for browsers that show
// none, in a frame at the end of the body (PROTOCOL-WEB, Message framing). Failed writes are not looked at: the client
// has gone.
func (c *call) accept(w http.ResponseWriter, re reply) string {
	compressed := re.encoding != "" && re.encoding != "identity"
	if len(re.body) == 0 && c.codec == "application/json" && !compressed {
		re.body = []byte("{}") // an empty message is not empty in JSON
	}
	h := w.Header()
	h["Content-Type"] = []string{c.contentType}
	if c.protocol == connect {
		if compressed {
			h["Content-Encoding"] = []string{re.encoding}
		}
		w.Write(re.body)
		return "200"
	}
	prefix := [envelopePrefix]byte{}
	if compressed {
		prefix[0] = flagCompressed
		h["Grpc-Encoding"] = []string{re.encoding}
	}
	binary.BigEndian.PutUint32(prefix[1:], uint32(len(re.body)))
	// Before the first Write: only a chunked answer has trailers (RFC 9112, section 7.1.2), and net/http would give a
	// short one a length.
	if c.protocol == grpc {
		h[http.TrailerPrefix+"Grpc-Status"] = []string{"0"}
	}
	w.Write(prefix[:])
	w.Write(re.body)
	if c.protocol == grpcWeb {
		const trailers = "grpc-status: 0\r\n" // in lower case, and no empty line after it: PROTOCOL-WEB
		w.Write([]byte{flagTrailers, 0, 0, 0, byte(len(trailers))})
		io.WriteString(w, trailers)
	}
	return "grpc-0"
}

// refuse answers with the fault's code. gRPC and gRPC-Web take a status in the headers of an answer without a body
// (Trailers-Only), also with a content type that is not served: HTTP says 415 then. All their other refusals are HTTP
// 200 (PROTOCOL-HTTP2, HTTP-Status). Lengths are stated for the reason that writeText gives.
func (c *call) refuse(w http.ResponseWriter, f *fault) string {
	h := w.Header()
	if f.retryAfter != "" {
		h.Set("Retry-After", f.retryAfter)
	}
	if c.protocol == connect {
		return refuseConnect(w, f)
	}
	if c.protocol == unknownProtocol && !strings.HasPrefix(c.contentType, "application/grpc") {
		h.Set("Accept-Post", acceptPost)
		writeText(w, f.status, f.public+"\n")
		return strconv.Itoa(f.status)
	}
	h["Content-Type"] = []string{c.contentType}
	h["Content-Length"] = []string{"0"}
	h["Grpc-Status"] = []string{strconv.Itoa(int(f.code))}
	h["Grpc-Message"] = []string{encodeGRPCMessage(f.public)}
	if c.protocol == unknownProtocol {
		h["Content-Type"] = []string{"application/grpc"} // or gRPC clients would look at the HTTP status alone
		h.Set("Accept-Post", acceptPost)
		w.WriteHeader(f.status)
		return strconv.Itoa(f.status)
	}
	w.WriteHeader(http.StatusOK)
	return "grpc-" + strconv.Itoa(int(f.code))
}

// refuseConnect answers with the JSON error of Connect unary, whatever the codec of the request. The HTTP status is the
// one that goes with the code (Connect protocol, Error Codes), not that of /ingest.
func refuseConnect(w http.ResponseWriter, f *fault) string {
	name, status := f.code.describe()
	body, err := json.Marshal(struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}{name, f.public})
	if err != nil {
		panic(err) // two strings
	}
	h := w.Header()
	h["Content-Type"] = []string{"application/json"}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	w.Write(body)
	return strconv.Itoa(status)
}

// encodeGRPCMessage percent-encodes a grpc-message: all bytes but printable ASCII, and the percent sign itself
// (PROTOCOL-HTTP2, Percent-Encoded). Line breaks between several upstreams' words become %0A.
func encodeGRPCMessage(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
