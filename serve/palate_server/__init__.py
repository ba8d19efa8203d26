"""The serving program: a spec file in, a running OpenAI-compatible endpoint out. Knows files and a port, never stores or clients."""
