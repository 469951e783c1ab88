"""`seechat serve`: an OpenAI-compatible server and a page to drop pictures on (extra `server`).

One request visits: access.py (may this client ask here?) → request_limits.py (the body, within
limits) → app.py (routes) → openai_api.py or demo_api.py, with json_formats.py (to a
GenerationRequest) → image_urls.py and fetch.py (URLs to bytes) → scheduler.py (its turn by
fair_queue.py; one thread, one model) → back through openai_api.py as JSON or events.
"""
