"""What is kept of requests and people's opinions: the request log, redaction, feedback."""
