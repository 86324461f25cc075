"""What kombu, celery's messaging library, does to a broker: the topology that celery declares, and its patterns of use."""

import socket
import uuid

from amqp.exceptions import PreconditionFailed
from kombu import Connection, Consumer, Exchange, Producer, Queue

from checks import check, equal, main, unique


def drain(connection, seen, wanted):
    """Lets the consumers run until they have seen enough."""
    while len(seen) < wanted:
        connection.drain_events(timeout=30)


def waiting(queue):
    """How many messages wait in the queue; of use after confirmed publishes only."""
    return queue.queue_declare(passive=True).message_count


@check
def a_task_travels_as_celery_sends_it(url):
    """Durable direct exchange and queue without arguments, JSON, persistent, published with the name of the queue."""
    name, oid = unique("celery"), uuid.uuid4().hex
    seen = []
    with Connection(url) as connection:
        replies = Queue(oid, durable=True, auto_delete=True, expires=86400)
        replies(connection.default_channel).declare()
        tasks = Queue(name, Exchange(name, "direct", durable=True), routing_key=name, durable=True)
        tasks(connection.default_channel).declare()
        headers = {"task": "add", "id": oid, "timelimit": [None, None], "retries": 0, "eta": None}
        producer = Producer(connection.default_channel, serializer="json")
        for _ in range(2):
            producer.publish(
                [[40, 2], {}, {"chain": None}],
                exchange="",
                routing_key=name,
                declare=[tasks],
                headers=headers,
                correlation_id=oid,
                reply_to=oid,
                delivery_mode=2,
                priority=0,
            )
        with Consumer(connection, [tasks], callbacks=[lambda body, message: seen.append((body, message))], prefetch_count=4):
            drain(connection, seen, 2)
            for body, message in seen:
                equal(body, [[40, 2], {}, {"chain": None}])
                equal(message.headers, headers)
                equal(message.properties["reply_to"], oid)
                message.ack()
                producer.publish({"status": "SUCCESS"}, exchange="", routing_key=oid, correlation_id=oid)
        answers = []
        with Consumer(connection, [replies], callbacks=[lambda body, _: answers.append(body)], no_ack=True):
            drain(connection, answers, 2)
        equal(answers, [{"status": "SUCCESS"}] * 2)
        equal(tasks(connection.default_channel).delete(), 0)


@check
def a_broadcast_reaches_every_mailbox(url):
    """Celery's remote control: a fanout exchange, an exclusive auto-delete queue for each worker, replies by a direct one."""
    name = unique("pidbox")
    fanout = Exchange(name, "fanout", durable=False, auto_delete=True)
    seen = []
    with Connection(url) as first, Connection(url) as second, Connection(url) as control:
        consumers = []
        for number, connection in enumerate((first, second)):
            box = Queue(f"{number}.{name}", fanout, exclusive=True, auto_delete=True, durable=False, expires=10, message_ttl=300)
            on_message = lambda body, _, number=number: seen.append((number, body["method"]))
            consumer = Consumer(connection, [box], callbacks=[on_message], no_ack=True)
            consumer.consume()
            consumers.append(consumer)
        Producer(control.default_channel).publish({"method": "ping"}, exchange=fanout, routing_key="", declare=[fanout])
        drain(first, seen, 1)
        drain(second, seen, 2)
        equal(sorted(seen), [(0, "ping"), (1, "ping")])
        for consumer in consumers:
            consumer.cancel()


@check
def events_go_by_topic(url):
    """Celery's events: one topic exchange, task and worker events told apart by their keys."""
    topic = Exchange(unique("ev"), "topic", durable=True, auto_delete=True)
    seen = []
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        queue = Queue(unique("ev"), topic, routing_key="worker.#", exclusive=True)
        with Consumer(connection, [queue], callbacks=[lambda body, _: seen.append(body)], no_ack=True):
            producer = Producer(connection.default_channel, exchange=topic)
            for key in ("task.multi", "worker.heartbeat", "worker.online"):
                producer.publish(key, routing_key=key)
            drain(connection, seen, 2)
            equal(waiting(queue(connection.default_channel)), 0)
    equal(seen, ["worker.heartbeat", "worker.online"])


@check
def a_requeued_message_is_marked_redelivered(url):
    seen = []
    with Connection(url) as connection:
        queue = Queue(unique("queue"), exclusive=True)
        with Consumer(connection, [queue], callbacks=[lambda _, message: seen.append(message)]):
            Producer(connection.default_channel).publish("x", exchange="", routing_key=queue.name)
            drain(connection, seen, 1)
            seen[0].requeue()
            drain(connection, seen, 2)
            seen[1].ack()
    equal([message.delivery_info["redelivered"] for message in seen], [False, True])


@check
def confirmed_publishes_are_confirmed(url):
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        queue = Queue(unique("queue"), exclusive=True)(connection.default_channel)
        queue.declare()
        for number in range(50):
            Producer(connection.default_channel).publish(number, exchange="", routing_key=queue.name)
        equal(queue.queue_declare(passive=True).message_count, 50)


@check
def a_simple_queue_puts_and_gets(url):
    with Connection(url) as connection:
        queue = connection.SimpleQueue(unique("simple"))
        queue.put({"hello": "world"})
        message = queue.get(timeout=30)
        equal(message.payload, {"hello": "world"})
        message.ack()
        equal(queue.qsize(), 0)
        queue.close()
        equal(queue.queue(connection.channel()).delete(), 0)


@check
def a_queue_with_other_arguments_is_refused(url):
    """Why olive puts no arguments on a queue that others publish to: this is what their next send would get."""
    name = unique("queue")
    with Connection(url) as connection:
        Queue(name, message_ttl=60, durable=True)(connection.default_channel).declare()
        try:
            Queue(name, durable=True)(connection.channel()).declare()
        except PreconditionFailed as refused:
            wanted = "inequivalent arg 'x-message-ttl' for queue"
            equal(wanted in str(refused), True)
        else:
            raise AssertionError("declared twice with different arguments")
        Queue(name)(connection.channel()).delete()


@check
def heartbeats_are_exchanged(url):
    # Real time is what this tests.
    import time

    with Connection(url, heartbeat=2) as connection:
        connection.connect()
        equal(connection.get_heartbeat_interval(), 2)
        end = time.monotonic() + 7
        while time.monotonic() < end:
            try:
                connection.drain_events(timeout=0.5)
            except socket.timeout:
                connection.heartbeat_check(rate=2)
        equal(connection.connected, True)
        connection.default_channel.queue_declare("", exclusive=True)


if __name__ == "__main__":
    main()
