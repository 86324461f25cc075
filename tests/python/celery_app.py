"""The celery application of celery_checks.py, for the worker and for the client."""

import os

from celery import Celery

app = Celery("celery_app", broker=os.environ["CELERY_CHECK_BROKER"], backend="rpc://")
app.conf.task_default_queue = os.environ["CELERY_CHECK_QUEUE"]


@app.task
def add(a, b):
    return a + b


@app.task(bind=True, max_retries=2)
def third_time_lucky(self):
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    return self.request.retries
