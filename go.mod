module pyroscope-relay

go 1.26
