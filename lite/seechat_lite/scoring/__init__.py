"""Scores captions: which method's text describes a picture best, by Chinese-CLIP.

scorer.py runs the towers; captions.py reads what methods wrote; comparison.py brings both together;
win_table.py counts; chart.py and page.py show the result.
"""
