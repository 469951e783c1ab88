"""Turns a picture's file into pixels, safely.

formats.py finds what a file is by its first bytes. headers.py reads from JPEG and PNG what is
needed before anything is decoded. decode.py decodes within bounds and reduce.py scales. worker.py
is the process in which that happens; pool.py starts, asks and ends it. The first four import
neither numpy nor the rest of the runtime, so that a worker starts in a tenth of a second with 15
MB.
"""
