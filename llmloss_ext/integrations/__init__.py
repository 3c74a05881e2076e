"""Other libraries' models with the losses of this one; each needs that library, and says so."""
