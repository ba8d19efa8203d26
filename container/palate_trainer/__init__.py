"""The training program: a spec file in, a tuned model folder out. Knows files, never stores or clients."""
