"""From a sample's bytes to arrays: pictures, captions, transforms."""
