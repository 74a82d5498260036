"""What `benchmarks/gpu` does on a machine with a GPU: prove, then measure, then tell.

`proof` runs the GPU tests and knows which ops they leave red; `cases` lists what is timed, most
wanted first; `part` times a part within its seconds and keeps what it has after each case;
`reader` turns the files into tables and plots, without any number whose tests were red.
"""
