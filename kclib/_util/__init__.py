"""What every room needs and none is about: checks of arguments, whole files, threads, bars, folders."""
