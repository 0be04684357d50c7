EXTENSION = False
EXTENSION_ERROR: str | None = "the extension is not built"
