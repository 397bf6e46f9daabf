"""The rendered scenes and the small encoder that the default runs on."""
