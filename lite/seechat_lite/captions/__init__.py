"""Captions of many pictures: one answer about each, without a chat.

places.py finds pictures (archive.py and table.py inside of files), ahead.py reads and decodes them
in other threads, writer.py has the engine write, run.py puts these together. known.py and lines.py
remember what has been captioned.
"""
