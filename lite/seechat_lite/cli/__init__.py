"""The command `seechat`: what people and scripts type, and what they are told. Imported when run.

Nothing outside this folder knows the options of a command line.
"""
