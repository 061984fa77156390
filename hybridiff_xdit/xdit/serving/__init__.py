"""The two sides of a server, HTTP and the ranks; `serve` starts them. Read messages, ranks, request, metrics, http."""
