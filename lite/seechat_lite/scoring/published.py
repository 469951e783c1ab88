"""The shares that SEEChat's authors published, to stand beside one's own.

1000 Chinese pictures from the web, seven methods, Chinese-CLIP as the judge. Which of its sizes it
was, the prompts, the decoding and the pictures are not published (docs/captions.md).
"""

SOURCE = "https://github.com/360CVGroup/SEEChat (doc/img/captionwinrate.png)"
PICTURES = 1000
STANDARD_ERROR = 1.5  # points, of 33 % of 1000 pictures
SHARES = {
    "SEEChat": 33,
    "web text": 23,
    "VisualGLM": 13,
    "MiniGPT-4": 11,
    "BLIP-2": 9,
    "LLaVA": 7,
    "mPLUG-Owl": 4,
}  # %
