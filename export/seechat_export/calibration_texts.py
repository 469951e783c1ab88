"""Dialogues that an export is calibrated with unless it is given texts: (question, answer).

They were written for this. They differ in subject, language and form, for the statistics of a
layer's inputs to be those of everyday answers: prose, lists, code, numbers, translations.
"""

DIALOGUES = (
    (
        "你好，请介绍一下你自己。",
        "你好！我是一个能看图片、会说中文和英文的助手。你可以给我一张图片，问我里面有什么、"
        "是什么颜色、有几个；也可以请我写一段文字、翻译一句话，或者解释一个概念。如果我不确"
        "定，我会直接告诉你。",
    ),
    (
        "Why is the sky blue during the day and red in the evening?",
        "Sunlight is a mixture of all colours. On its way through the air, blue "
        "light is scattered far more than red light, so blue reaches our eyes "
        "from every direction and the whole sky looks blue. In the evening the "
        "light has to travel a much longer way through the air. By then most "
        "of the blue has been scattered out of it, and what is left is orange "
        "and red.",
    ),
    (
        "描述这张图片。",
        "图片里是一间明亮的厨房。木桌上放着一只白色的盘子，盘子里有三个红苹果和一串葡萄，旁"
        "边是一杯还冒着热气的茶。窗台上趴着一只橘色的猫，正望着窗外下雨的街道。整个画面给人"
        "安静、温暖的感觉。",
    ),
    (
        "Describe the picture in detail.",
        "A man in a yellow raincoat is walking two small dogs along a beach. "
        "The sea behind him is grey and rough, and the sky is covered with low "
        "clouds. On the left there is a wooden fence with a lifebuoy hanging "
        "on it; on the right, in the distance, one can see a lighthouse with "
        "red and white stripes. One of the dogs is looking straight at the camera.",
    ),
    (
        "请写一个 Python 函数，判断一个数是不是质数。",
        "def is_prime(n: int) -> bool:\n    if n < 2:\n        return False\n "
        "   i = 2\n    while i * i <= n:\n        if n % i == 0:\n           "
        " return False\n        i += 1\n    return True\n\n这个函数从 2 开始试除，只需要试"
        "到 n 的平方根。例如 is_prime(97) 返回 True，is_prime(91) 返回 False，因为 "
        "91 = 7 × 13。",
    ),
    (
        "List five things one should do before a long hike.",
        "1. Check the weather forecast for the whole day, and turn back in time "
        "if it changes.\n2. Tell somebody where you are going and when you expect "
        "to be back.\n3. Pack at least two litres of water, some food, a map "
        "and a small first-aid kit.\n4. Wear shoes that you have walked in before; "
        "new ones cause blisters.\n5. Charge your phone, and write down the number "
        "of the mountain rescue service.",
    ),
    (
        "为什么四季会变化？",
        "四季变化的原因是地球的自转轴是倾斜的，与公转平面的垂线大约成 23.5 度角。地球绕太阳"
        "公转一周需要一年。当北半球朝向太阳时，阳光更直、白天更长，那里就是夏天；半年以后北"
        "半球背向太阳，就到了冬天。这和地球离太阳的远近关系不大。",
    ),
    (
        "Translate into Chinese: The meeting was moved to Thursday because the manager is ill.",
        "因为经理生病了，会议改到了星期四。",
    ),
    (
        "把这句话翻译成英文：如果明天不下雨，我们就去公园放风筝。",
        "If it does not rain tomorrow, we will go to the park and fly a kite.",
    ),
    (
        "A train leaves at 9:40 and arrives at 13:05. It covers 287 kilometres. How fast is it?",
        "From 9:40 to 13:05 it takes 3 hours and 25 minutes, which is about 3.417 "
        "hours. 287 divided by 3.417 is 84. So the train travels at an average "
        "speed of about 84 kilometres an hour.",
    ),
    (
        "小明有 24 颗糖，分给 5 个朋友，每人一样多，还剩几颗？",
        "24 除以 5 等于 4，余 4。所以每个朋友分到 4 颗糖，还剩下 4 颗。",
    ),
    (
        "Write a short, polite e-mail to a landlord about a broken heater.",
        "Dear Ms Carter,\n\nI am writing about the heater in the living room "
        "of flat 12. Since Monday evening it has stayed cold, although the thermostat "
        "is set to 21 degrees. I have already checked the valve and the fuse. "
        "Could you please send somebody to look at it this week? I am at home "
        "every day after four o'clock.\n\nThank you very much, and kind regards,\nDaniel "
        "Weber",
    ),
    (
        "写一首关于秋天的短诗。",
        "西风吹过旧篱笆，\n黄叶轻轻落满阶。\n一声雁叫云天远，\n月照窗前菊正开。",
    ),
    (
        "What is the difference between weather and climate?",
        "Weather is what happens outside right now or within a few days: rain "
        "this afternoon, wind tomorrow, a warm weekend. Climate is what is usual "
        "in a place over decades. A single cold winter says little about the "
        "climate, just as one bad day says little about a person's character. "
        "People sum it up like this: climate is what you expect, weather is what "
        "you get.",
    ),
    (
        "图里有几个人？他们在做什么？",
        "图里有四个人：两个大人和两个孩子。他们围坐在草地上的格子布旁边野餐。穿蓝裙子的女士"
        "正在切面包，戴眼镜的男士在倒果汁，两个孩子一边吃西瓜，一边笑着看他们的小狗追蝴蝶。",
    ),
    (
        "How does a refrigerator keep food cold?",
        "A refrigerator does not make cold, it moves heat. A liquid with a low "
        "boiling point flows through thin pipes inside the cabinet, where it "
        "evaporates and takes heat away from the food. A compressor then squeezes "
        "the vapour, which becomes hot, and pumps it to the pipes on the back. "
        "There it gives the heat to the room and turns into a liquid again. This "
        "circle goes on until the thermostat says that it is cold enough.",
    ),
    (
        "请用表格比较猫和狗。",
        "| 方面 | 猫 | 狗 |\n|---|---|---|\n| 性格 | 独立，喜欢安静 | 热情，需要陪伴 "
        "|\n| 运动 | 自己会玩 | 每天要出门散步 |\n| 花费 | 较少 | 较多 |\n| 训练 "
        "| 比较难 | 比较容易 |\n\n如果你经常不在家，猫更合适；如果你喜欢户外活动，可以选择"
        "狗。",
    ),
    (
        "Summarize in one sentence: The city council decided on Tuesday to close "
        "the old bridge for cars. From May on, only buses, bicycles and pedestrians "
        "may use it. Shop owners fear that customers will stay away, while residents "
        "hope for less noise.",
        "From May on the old bridge will be closed to cars, which worries shop "
        "owners and pleases residents.",
    ),
    (
        "中国有哪些传统节日？",
        "主要的传统节日有：\n- 春节：农历正月初一，家人团圆，贴春联、放鞭炮、吃饺子。\n- "
        "元宵节：正月十五，赏灯、吃汤圆。\n- 清明节：四月初，扫墓、踏青。\n- "
        "端午节：五月初五，赛龙舟、吃粽子。\n- 中秋节：八月十五，赏月、吃月饼。\n- "
        "重阳节：九月初九，登高、敬老。",
    ),
    (
        'What does this JSON say? {"name": "Lin", "age": 31, "city": '
        '"Suzhou", "languages": ["zh", "en", "fr"], "remote": true}',
        "It describes a person called Lin who is 31 years old, lives in Suzhou, "
        "speaks Chinese, English and French, and works remotely.",
    ),
    (
        "怎样才能睡得更好？",
        "可以试试这几点：每天在同一时间上床和起床；睡前一小时不看手机；下午以后不喝咖啡和浓"
        "茶；卧室保持安静、黑暗、凉爽；白天多活动，但不要在睡前做剧烈运动。如果连续几个星期"
        "都睡不好，建议去看医生。",
    ),
    (
        "Who wrote Romeo and Juliet, and what is it about?",
        "William Shakespeare wrote it around 1595. Two young people from families "
        "that hate each other, the Montagues and the Capulets of Verona, fall "
        "in love and marry in secret. A chain of quarrels and misunderstandings "
        "ends in the death of both, and only then do the families make peace.",
    ),
    (
        "帮我想三个咖啡店的名字，并说明理由。",
        "1. “慢一点”：提醒客人放下手机，慢慢喝完一杯咖啡。\n2. “转角的光”：店在街角，早"
        "上的阳光正好照在第一张桌子上。\n3. “豆子先生”：容易记，也能画成一个可爱的标志，"
        "印在杯子和袋子上。",
    ),
    (
        "What colour is the car, and what is written on the sign next to it?",
        "The car is dark green with a white roof. The sign next to it says “No "
        "parking, Monday to Friday, 8 am to 6 pm”; somebody has stuck a small "
        "round sticker on its lower edge.",
    ),
)
