"""Run before the packed application: lets it be started again as the process for pictures."""

from seechat_lite.pictures.worker import run_if_asked

run_if_asked()
