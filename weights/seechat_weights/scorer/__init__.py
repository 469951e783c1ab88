"""Chinese-CLIP, which scores captions: how well does a text describe a picture?"""
