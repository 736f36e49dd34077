"""The KV cache's accounting: which block belongs to whom, which can be matched, which is free. No tensors."""
