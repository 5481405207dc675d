"""Serve every room: checks of arguments, whole files, threads, progress bars, and folders of caches."""
