"""Embeddings z_i and z_t of whole collections: computed, stored, summed, read in pairs."""
