"""The model runner: row buffers, the forward pass of one step, sampling."""
