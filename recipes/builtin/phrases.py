"""Words the answers are made of: places, numbers, verdicts, articles."""

from collections.abc import Sequence

# place: Chinese, then how English says it
PLACES = {
    "left": (("左边", "左侧", "左面"), ("on the left", "on the left side", "at the left")),
    "right": (("右边", "右侧", "右面"), ("on the right", "on the right side", "at the right")),
    "top": (("上面", "上边", "上方"), ("at the top", "on top", "above")),
    "bottom": (("下面", "下边", "下方"), ("at the bottom", "on the bottom", "below")),
    "middle": (("中间", "正中间", "中央"), ("in the middle", "in the centre", "in the center")),
    "top left": (("左上角", "左上方", "左上"), ("at the top left", "in the top left corner")),
    "top right": (("右上角", "右上方", "右上"), ("at the top right", "in the top right corner")),
    "bottom left": (
        ("左下角", "左下方", "左下"),
        ("at the bottom left", "in the bottom left corner"),
    ),
    "bottom right": (
        ("右下角", "右下方", "右下"),
        ("at the bottom right", "in the bottom right corner"),
    ),
}
# how people begin and end a question
BEGINNINGS_ZH = (
    "请问", "请问", "请问一下，", "你好，", "您好，", "请告诉我", "请告诉我，", "那", "嗯，",
    "想问一下", "我想问一下，", "我想知道", "麻烦问一句，", "帮我看看，", "快告诉我", "不好意思，",
    "对了，", "诶，",
)  # fmt: skip
ENDINGS_ZH = ("呀？", "啊？", "呢？", "呀", "？谢谢", "？谢谢！", "，谢谢", "？请回答。", "！", "…")
BEGINNINGS_EN = (
    "please tell me, ", "hi, ", "so ", "ok, ", "hey, ", "hello, ", "excuse me, ", "sorry, ",
    "quick question: ", "well, ", "um, ", "now ", "I wonder, ",
)  # fmt: skip
ENDINGS_EN = (", please", " please?", ", please?", "? Thanks", "? Thanks!", " thanks", "!", "...")
NUMBERS_ZH = ("零", "一", "两", "三", "四")
NUMBERS_EN = ("no", "one", "two", "three", "four")
YES_NO_ZH = {
    "animal": ("是的", "不是"), "plant": ("是的", "不是"), "food": ("能吃", "不能吃"),
    "drink": ("能喝", "不能喝"), "fly": ("会飞", "不会飞"), "swim": ("会游泳", "不会游泳"),
    "wear": ("能穿戴", "不能穿戴"), "vehicle": ("是的", "不是"), "music": ("是的", "不是"),
    "building": ("是的", "不是"), "electric": ("用电", "不用电"),
    "wheels": ("有轮子", "没有轮子"), "big": ("比人大", "不比人大"),
}  # fmt: skip
UNSURE = {
    "zh": "我不确定这是什么。",
    "en": "I am not sure what this is.",
}
NO_PICTURE = {"zh": "请先给我一张图片。", "en": "Please give me a picture first."}
# English names that take no article, because there is no single one of them
MASS = frozenset(
    """milk|honey|rain|snow|cheese|bacon|bread|butter|salt|popcorn|sushi|wine|beer|sake|coffee|fire
    |garlic|ginger|corn|chocolate|mate|whisky|oden|paella|fondue|stew|spaghetti|noodles|soap|yarn
    |lightning|DNA|Earth|Saturn|champagne|bowling|badminton|green tea|bubble tea|Mount Fuji
    |cooked rice|curry rice|canned food|shaved ice|ice cream|soft ice cream|field hockey|ice hockey
    |ping pong|meat on bone|fried shrimp|fish cake|leafy greens""".replace("\n    ", "").split("|")
)
# and those that are plural
PLURAL = frozenset(
    """grapes|cherries|blueberries|peanuts|beans|peas|pancakes|french fries|chopsticks|glasses
    |sunglasses|goggles|jeans|gloves|socks|briefs|shorts|skis|books|scissors|headphones
    |clinking glasses|ballet shoes|paw prints|fallen leaves|nesting dolls
    |crossed swords""".replace("\n    ", "").split("|")
)
SPECIAL = {
    "sun": "the sun",
    "Statue of Liberty": "the Statue of Liberty",
    "SUV": "an SUV",
    "8 ball": "an 8 ball",
    "unicorn": "a unicorn",
}


def noun(name: str) -> str:
    """An English name with the article it needs."""
    if name in MASS or name in PLURAL:
        return name
    return SPECIAL.get(name) or ("an " if name[0].lower() in "aeiou" else "a ") + name


def join(names: Sequence[str], lang: str) -> str:
    """苹果、狗和猫 / a, b and c"""
    if len(names) == 1:
        return names[0]
    comma, last = ("、", "和") if lang == "zh" else (", ", " and ")
    return comma.join(names[:-1]) + last + names[-1]
