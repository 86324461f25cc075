"""Sends tasks the way sweepea's own producer does: pika, a JSON body, pika's default properties, nothing declared.

Prints one line for each task sent, its tid, then waits for nothing: with --replies it collects the replies first
declared for, one JSON object a line.
"""

import argparse
import json
import sys
import uuid

import pika


def task_body(func, args, kwargs, timeout, resp_exchange, resp_routing_key):
    """The message body, with the fields and in the order that sweepea's TaskMessage has them."""
    return {
        "func": func,
        "args": args,
        "kwargs": kwargs,
        "tid": str(uuid.uuid4()),
        "timeout": timeout,
        "resp_exchange": resp_exchange,
        "resp_routing_key": resp_routing_key,
    }


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--url", required=True)
    options.add_argument("--exchange", default="Olive.x")
    options.add_argument("--key", default="Olive.k")
    options.add_argument("--func", default="olive.tasks.sleep_n")
    options.add_argument("--args", type=json.loads, default=[0])
    options.add_argument("--kwargs", type=json.loads, default={})
    options.add_argument("--timeout", type=float, default=-1)
    options.add_argument("--body", help="send this instead of a task")
    options.add_argument("--count", type=int, default=1)
    options.add_argument("--resp-exchange", help="a direct exchange to declare for the replies")
    options.add_argument("--resp-key", default="")
    options.add_argument("--replies", type=int, default=0, help="how many different tasks' replies to wait for")
    given = options.parse_args()

    connection = pika.BlockingConnection(pika.URLParameters(given.url))
    channel = connection.channel()
    replies = None
    if given.resp_exchange:
        # The producer's own, so its own settings: gone with the connection.
        channel.exchange_declare(given.resp_exchange, "direct", auto_delete=True)
        replies = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(replies, given.resp_exchange, given.resp_key)

    if given.body is not None:
        channel.basic_publish(given.exchange, given.key, given.body)
        given.count = 0

    for _ in range(given.count):
        body = task_body(given.func, given.args, given.kwargs, given.timeout, given.resp_exchange, given.resp_key or None)
        channel.basic_publish(given.exchange, given.key, json.dumps(body))
        print(json.dumps({"sent": body["tid"]}), flush=True)

    if given.replies:
        collect(channel, replies, given.replies)
    connection.close()


def collect(channel, queue, wanted):
    """Prints every reply until `wanted` different tasks have answered; a redelivered task may answer twice."""
    answered = set()
    for _method, properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=60):
        if body is None:
            sys.exit(f"replies of {len(answered)} of {wanted} tasks after 60 s without one")
        reply = json.loads(body)
        reply["correlation_id"] = properties.correlation_id
        print(json.dumps(reply), flush=True)
        answered.add(reply["tid"])
        if len(answered) == wanted:
            return


if __name__ == "__main__":
    main()
