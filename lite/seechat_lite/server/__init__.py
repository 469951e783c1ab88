"""`seechat serve`: an OpenAI-compatible server and a page to drop pictures on (extra `server`).

One request visits: guard.py (may this client ask here?) → intake.py (the body, within limits) →
app.py (routes) → completions.py or legacy.py (request to Ask) → images.py and fetch.py (URLs to
bytes) → desk.py (its turn by fair_queue.py; one thread, one model) → back through completions.py as
JSON or events.
"""
