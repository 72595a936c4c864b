"""Which conversations are worth learning from: few good ones teach more than many (Llama 2, section 3.1)."""
