"""What `llmloss train` is made of: text, tokens, windows, model, losses, loop, and its outputs."""
