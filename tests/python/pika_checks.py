"""What pika does to a broker in the course of a day, and what it must be told when it errs."""

import decimal
import socket
import time

import pika
from pika.exceptions import (
    AMQPConnectionError,
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    NackError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    UnroutableError,
)

from checks import check, equal, main, unique


def connect(url, **changes):
    parameters = pika.URLParameters(url)
    parameters.socket_timeout = 30
    parameters.blocked_connection_timeout = 30
    for name, value in changes.items():
        setattr(parameters, name, value)
    return pika.BlockingConnection(parameters)


def channel_of(url):
    """A channel whose publishes wait for their confirm: RabbitMQ answers a passive declare before it has put away what
    was sent earlier, so without confirms no count could be relied on."""
    channel = connect(url).channel()
    channel.confirm_delivery()
    return channel


def bodies(channel, queue, count):
    """The next `count` messages, in order."""
    found = []
    for method, _properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=30):
        if method is None:
            raise AssertionError(f"only {len(found)} of {count} messages came: {found!r}")
        found.append(body)
        if len(found) == count:
            break
    channel.cancel()
    return found


def waiting(channel, queue):
    """How many messages wait in the queue after the last confirmed publish; what it had to deliver for that is here."""
    count = channel.queue_declare(queue, passive=True).method.message_count
    channel.connection.process_data_events(time_limit=0)
    return count


def closes_channel(channel, code, text, action):
    """The action must make the broker close the channel, and only the channel, with this code and text."""
    try:
        action(channel)
        # An error of a method without a reply shows at the next one with a reply.
        channel.queue_declare("", exclusive=True)
    except ChannelClosedByBroker as closed:
        equal(closed.reply_code, code)
        if text not in closed.reply_text:
            raise AssertionError(f"found {closed.reply_text!r}, wanted {text!r} in it") from closed
    else:
        raise AssertionError(f"the channel stayed open, wanted {code} {text}")
    equal(channel.connection.is_open, True)
    return channel.connection.channel()


def closes_connection(channel, code, text, action):
    try:
        action(channel)
        channel.queue_declare("", exclusive=True)
    except ConnectionClosedByBroker as closed:
        equal(closed.reply_code, code)
        if text not in closed.reply_text:
            raise AssertionError(f"found {closed.reply_text!r}, wanted {text!r} in it") from closed
    else:
        raise AssertionError(f"the connection stayed open, wanted {code} {text}")


# ---- the handshake ----


@check
def connects_and_closes(url):
    connection = connect(url)
    channel = connection.channel()
    channel.close()
    equal(connection.channel().is_open, True)
    connection.close()
    equal(connection.is_closed, True)


@check
def tells_its_capabilities(url):
    connection = connect(url)
    for name in ("basic_nack_supported", "consumer_cancel_notify_supported", "publisher_confirms_supported"):
        equal(getattr(connection, name), True)


@check
def refuses_a_wrong_password(url):
    try:
        connect(url, credentials=pika.PlainCredentials("guest", "wrong"))
    except ProbableAuthenticationError as refused:
        equal("ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN" in str(refused), True)
    else:
        raise AssertionError("logged in with a wrong password")


@check
def refuses_an_unknown_vhost(url):
    try:
        connect(url, virtual_host="nope")
    except ProbableAccessDeniedError as refused:
        equal("vhost nope not found" in str(refused), True)
    except AMQPConnectionError as refused:
        raise AssertionError(f"refused otherwise: {refused!r}") from refused
    else:
        raise AssertionError("opened a vhost that is not there")


@check
def many_channels_work_side_by_side(url):
    connection = connect(url)
    channels = [connection.channel() for _ in range(20)]
    queues = [channel.queue_declare("", exclusive=True).method.queue for channel in channels]
    for number, (channel, queue) in enumerate(zip(channels, queues)):
        channel.basic_publish("", queue, str(number).encode())
    for number, (channel, queue) in enumerate(zip(channels, queues)):
        equal(bodies(channel, queue, 1), [str(number).encode()])


@check
def a_closed_channel_number_can_be_opened_again(url):
    connection = connect(url)
    for _ in range(3):
        channel = connection.channel(7)
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_publish("", queue, b"x")
        equal(bodies(channel, queue, 1), [b"x"])
        channel.close()


@check
def heartbeats_keep_an_idle_connection_open(url):
    # Real time is what this tests: a broker that sends none loses the client after two of its intervals.
    connection = connect(url, heartbeat=1)
    connection.process_data_events(time_limit=4)
    equal(connection.is_open, True)
    connection.channel().queue_declare("", exclusive=True)


# ---- exchanges and routing ----


@check
def the_default_exchange_routes_by_queue_name(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_publish("", queue, b"hello")
    equal(bodies(channel, queue, 1), [b"hello"])


@check
def a_direct_exchange_routes_by_equal_keys(url):
    channel = channel_of(url)
    exchange = unique("direct")
    channel.exchange_declare(exchange, "direct")
    queue = channel.queue_declare("", exclusive=True).method.queue
    for key in ("red", "green"):
        channel.queue_bind(queue, exchange, key)
    for key in ("red", "blue", "green", "red.green"):
        channel.basic_publish(exchange, key, key.encode())
    equal(bodies(channel, queue, 2), [b"red", b"green"])
    equal(waiting(channel, queue), 0)
    channel.exchange_delete(exchange)


@check
def a_fanout_exchange_copies_to_every_queue(url):
    channel = channel_of(url)
    exchange = unique("fanout")
    channel.exchange_declare(exchange, "fanout", auto_delete=True)
    queues = [channel.queue_declare("", exclusive=True).method.queue for _ in range(3)]
    for queue in queues:
        channel.queue_bind(queue, exchange)
    channel.basic_publish(exchange, "ignored", b"to all")
    for queue in queues:
        equal(bodies(channel, queue, 1), [b"to all"])


@check
def a_topic_exchange_matches_words(url):
    channel = channel_of(url)
    exchange = unique("topic")
    channel.exchange_declare(exchange, "topic", auto_delete=True)
    wanted = {
        "#": ["", "a", "a.b", "a.b.c", "x.b", "a..c"],
        "*": ["a"],
        "a.*": ["a.b"],
        "a.#": ["a", "a.b", "a.b.c", "a..c"],
        "#.b": ["a.b", "x.b"],
        "a.*.c": ["a.b.c", "a..c"],
        "#.#": ["", "a", "a.b", "a.b.c", "x.b", "a..c"],
    }
    queues = {}
    for pattern in wanted:
        queues[pattern] = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(queues[pattern], exchange, pattern)
    for key in wanted["#"]:
        channel.basic_publish(exchange, key, key.encode())
    for pattern, keys in wanted.items():
        equal((pattern, bodies(channel, queues[pattern], len(keys))), (pattern, [key.encode() for key in keys]))
        equal((pattern, waiting(channel, queues[pattern])), (pattern, 0))


@check
def two_matching_bindings_deliver_once(url):
    channel = channel_of(url)
    exchange = unique("topic")
    channel.exchange_declare(exchange, "topic", auto_delete=True)
    queue = channel.queue_declare("", exclusive=True).method.queue
    for pattern in ("a.*", "*.b", "#"):
        channel.queue_bind(queue, exchange, pattern)
    channel.basic_publish(exchange, "a.b", b"once")
    equal(bodies(channel, queue, 1), [b"once"])
    equal(waiting(channel, queue), 0)


@check
def an_unbound_queue_gets_no_more(url):
    channel = channel_of(url)
    exchange = unique("direct")
    channel.exchange_declare(exchange, "direct")
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, exchange, "k")
    channel.basic_publish(exchange, "k", b"before")
    channel.queue_unbind(queue, exchange, "k")
    channel.basic_publish(exchange, "k", b"after")
    equal(bodies(channel, queue, 1), [b"before"])
    equal(waiting(channel, queue), 0)
    channel.exchange_delete(exchange)


@check
def a_headers_exchange_matches_headers(url):
    channel = channel_of(url)
    exchange = unique("headers")
    channel.exchange_declare(exchange, "headers", auto_delete=True)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, exchange, "", {"x-match": "all", "a": 1, "b": "x"})
    channel.queue_bind(queue, exchange, "", {"x-match": "any", "c": 5})
    routed = []
    for headers in ({"a": 1, "b": "x"}, {"a": 1}, {"c": 5, "d": 6}, {"a": 1, "b": "y"}, None):
        try:
            channel.basic_publish(exchange, "", b"x", pika.BasicProperties(headers=headers), mandatory=True)
            routed.append(headers)
        except UnroutableError:
            pass
    equal(routed, [{"a": 1, "b": "x"}, {"c": 5, "d": 6}])
    channel.queue_unbind(queue, exchange, "", {"x-match": "any", "c": 5})
    text = 'PRECONDITION_FAILED - Invalid x-match field value <<"most">>; expected all, any, all-with-x, or any-with-x'
    closes_channel(channel, 406, text, lambda c: c.queue_bind(queue, exchange, "", {"x-match": "most"}))


@check
def an_alternate_exchange_takes_what_found_no_queue(url):
    channel = channel_of(url)
    rest, exchange = unique("rest"), unique("exchange")
    channel.exchange_declare(rest, "fanout", auto_delete=True)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, rest)
    channel.exchange_declare(exchange, "direct", arguments={"alternate-exchange": rest})
    channel.basic_publish(exchange, "nobody's", b"x", mandatory=True)
    equal(bodies(channel, queue, 1), [b"x"])
    channel.exchange_delete(exchange)


@check
def copies_go_to_further_keys_and_the_blind_ones_are_not_shown(url):
    channel = channel_of(url)
    first, second, third = (channel.queue_declare("", exclusive=True).method.queue for _ in range(3))
    headers = {"CC": [second], "BCC": [third], "mine": 1}
    channel.basic_publish("", first, b"x", pika.BasicProperties(headers=headers))
    for queue in (first, second, third):
        method, properties, _ = channel.basic_get(queue, auto_ack=True)
        equal((method.routing_key, properties.headers), (first, {"CC": [second], "mine": 1}))
    text = 'PRECONDITION_FAILED - invalid message: {unacceptable_type_in_header,"CC",longstr}'
    wrong = pika.BasicProperties(headers={"CC": "not a list"})
    closes_channel(channel, 406, text, lambda c: c.basic_publish("", first, b"x", wrong))


# ---- queues ----


@check
def a_queue_tells_its_counts(url):
    channel = channel_of(url)
    queue = unique("queue")
    equal(channel.queue_declare(queue).method.message_count, 0)
    for _ in range(3):
        channel.basic_publish("", queue, b"x")
    declared = channel.queue_declare(queue, passive=True).method
    equal((declared.queue, declared.message_count, declared.consumer_count), (queue, 3, 0))
    equal(channel.queue_purge(queue).method.message_count, 3)
    channel.basic_publish("", queue, b"x")
    equal(channel.queue_delete(queue).method.message_count, 1)
    closes_channel(channel, 404, f"NOT_FOUND - no queue '{queue}' in vhost '/'", lambda c: c.queue_declare(queue, passive=True))


@check
def a_server_named_queue_gets_a_name_of_its_own(url):
    channel = channel_of(url)
    first, second = (channel.queue_declare("", exclusive=True).method.queue for _ in range(2))
    equal(first.startswith("amq.gen-") and second.startswith("amq.gen-"), True)
    equal(first != second, True)


@check
def an_exclusive_queue_is_gone_with_its_connection(url):
    watcher, owner = channel_of(url), channel_of(url)
    queue = unique("mine")
    owner.queue_declare(queue, exclusive=True)
    text = f"RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{queue}' in vhost '/'"
    watcher = closes_channel(watcher, 405, text, lambda c: c.queue_declare(queue, passive=True))
    owner.connection.close()
    # RabbitMQ answers the close before it has deleted the queue.
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            watcher.queue_declare(queue, passive=True)
        except ChannelClosedByBroker as closed:
            if closed.reply_code == 404:
                return
            equal(closed.reply_code, 405)
            watcher = watcher.connection.channel()
    raise AssertionError("the queue outlived its owner")


@check
def an_auto_delete_queue_is_gone_with_its_last_consumer(url):
    channel = channel_of(url)
    queue = unique("auto")
    channel.queue_declare(queue, auto_delete=True)
    tags = [channel.basic_consume(queue, lambda *_: None) for _ in range(2)]
    channel.basic_cancel(tags[0])
    equal(channel.queue_declare(queue, passive=True).method.consumer_count, 1)
    channel.basic_cancel(tags[1])
    closes_channel(channel, 404, "NOT_FOUND - no queue", lambda c: c.queue_declare(queue, passive=True))


@check
def declaring_again_with_equal_settings_changes_nothing(url):
    channel = channel_of(url)
    queue, exchange = unique("queue"), unique("exchange")
    for _ in range(2):
        channel.queue_declare(queue, durable=True)
        channel.exchange_declare(exchange, "topic", durable=True)
        channel.queue_bind(queue, exchange, "k")
    channel.basic_publish(exchange, "k", b"once")
    equal(bodies(channel, queue, 1), [b"once"])
    equal(channel.queue_delete(queue).method.message_count, 0)
    channel.exchange_delete(exchange)


@check
def deleting_what_is_not_there_is_fine(url):
    channel = channel_of(url)
    channel.queue_delete(unique("never"))
    channel.exchange_delete(unique("never"))
    equal(channel.is_open, True)


@check
def removing_a_binding_that_is_not_there_is_fine(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    for of, from_ in ((queue, "amq.direct"), (queue, unique("never")), (unique("never"), "amq.direct")):
        channel.queue_unbind(of, from_, "k")
    equal(channel.is_open, True)


@check
def an_empty_queue_name_means_the_one_declared_last(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_publish("", queue, b"x")
    equal(channel.queue_purge("").method.message_count, 1)
    text = "NOT_FOUND - no previously declared queue"
    closes_channel(channel.connection.channel(), 404, text, lambda c: c.queue_purge(""))


@check
def a_full_queue_drops_its_oldest_or_refuses_the_newest(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True, arguments={"x-max-length": 2}).method.queue
    for body in (b"1", b"2", b"3"):
        channel.basic_publish("", queue, body)
    equal(bodies(channel, queue, 2), [b"2", b"3"])
    arguments = {"x-max-length": 2, "x-overflow": "reject-publish"}
    queue = channel.queue_declare("", exclusive=True, arguments=arguments).method.queue
    told = []
    for body in (b"1", b"2", b"3"):
        try:
            channel.basic_publish("", queue, body)
            told.append("ack")
        except NackError:
            told.append("nack")
    equal(told, ["ack", "ack", "nack"])
    equal(bodies(channel, queue, 2), [b"1", b"2"])


@check
def a_priority_queue_delivers_the_highest_first(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True, arguments={"x-max-priority": 5}).method.queue
    for body, priority in ((b"none", None), (b"3", 3), (b"above the highest", 9), (b"0", 0)):
        channel.basic_publish("", queue, body, pika.BasicProperties(priority=priority))
    equal(bodies(channel, queue, 4), [b"above the highest", b"3", b"none", b"0"])


@check
def a_queue_nobody_uses_expires(url):
    # Real time is what this tests.
    channel = channel_of(url)
    queue = unique("queue")
    channel.queue_declare(queue, arguments={"x-expires": 200})
    text = f"NOT_FOUND - no queue '{queue}' in vhost '/'"
    time.sleep(1)
    closes_channel(channel, 404, text, lambda c: c.queue_declare(queue, passive=True))


# ---- messages ----


@check
def properties_and_headers_come_back_as_sent(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    headers = {
        "text": "ünïcode",
        "yes": True,
        "int": -5,
        "big": 2**40,
        "decimal": decimal.Decimal("1.5"),
        "none": None,
        "list": [1, "two", {"three": 3}],
        "table": {"deep": {"deeper": "x"}},
        "bytes": b"\x00\xff",
    }
    sent = pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        headers=headers,
        delivery_mode=2,
        priority=3,
        correlation_id="c",
        reply_to="r",
        expiration="60000",
        message_id="m",
        timestamp=1700000000,
        type="t",
        user_id="guest",
        app_id="a",
    )
    channel.basic_publish("", queue, b"body", sent)
    channel.basic_publish("", queue, b"", pika.BasicProperties())
    method, found, body = channel.basic_get(queue, auto_ack=True)
    equal((method.routing_key, method.exchange, method.redelivered, method.message_count), (queue, "", False, 1))
    equal(body, b"body")
    equal(vars(found), vars(sent))
    _, found, body = channel.basic_get(queue, auto_ack=True)
    equal((vars(found), body), (vars(pika.BasicProperties()), b""))
    equal(channel.basic_get(queue), (None, None, None))


@check
def bodies_of_every_size_arrive_whole(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    # Around the largest payload of one frame, and over many frames.
    sizes = [0, 1, 131063, 131064, 131065, 262128, 1 << 20, 5_000_000]
    for size in sizes:
        channel.basic_publish("", queue, bytes(i % 251 for i in range(size % 1000)) + b"x" * (size - size % 1000))
    for size, body in zip(sizes, bodies(channel, queue, len(sizes))):
        equal(len(body), size)
        equal(body[: size % 1000], bytes(i % 251 for i in range(size % 1000)))


@check
def a_queue_is_first_in_first_out(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    sent = [str(number).encode() for number in range(500)]
    for body in sent:
        channel.basic_publish("", queue, body)
    equal(bodies(channel, queue, 500), sent)


@check
def consumers_of_a_queue_take_turns(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    seen = {0: [], 1: []}
    for number in seen:
        channel.basic_consume(queue, lambda _c, _m, _p, body, number=number: seen[number].append(body), auto_ack=True)
    for number in range(10):
        channel.basic_publish("", queue, str(number).encode())
    pump(channel, lambda: len(seen[0]) + len(seen[1]) == 10)
    equal((len(seen[0]), len(seen[1])), (5, 5))


def pump(channel, done):
    """Lets callbacks run until what they were to bring about is there."""
    end = time.monotonic() + 30
    while not done():
        if time.monotonic() > end:
            raise AssertionError("not done after 30 s")
        channel.connection.process_data_events(time_limit=1)


@check
def a_cancelled_consumer_gets_no_more(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    seen = []
    tag = channel.basic_consume(queue, lambda _c, _m, _p, body: seen.append(body), auto_ack=True)
    channel.basic_publish("", queue, b"first")
    pump(channel, lambda: seen)
    channel.basic_cancel(tag)
    channel.basic_publish("", queue, b"second")
    equal(waiting(channel, queue), 1)
    equal(seen, [b"first"])


@check
def deleting_a_queue_tells_its_consumers(url):
    channel = channel_of(url)
    queue = unique("doomed")
    channel.queue_declare(queue)
    told = []
    channel.add_on_cancel_callback(lambda frame: told.append(frame.method.consumer_tag))
    tag = channel.basic_consume(queue, lambda *_: None)
    channel_of(url).queue_delete(queue)
    pump(channel, lambda: told)
    equal(told, [tag])


# ---- settling ----


@check
def an_acked_message_is_gone(url):
    channel = channel_of(url)
    queue = unique("queue")
    channel.queue_declare(queue)
    for body in (b"1", b"2", b"3"):
        channel.basic_publish("", queue, body)
    for _ in range(2):
        last, _, _ = channel.basic_get(queue)
    channel.basic_ack(last.delivery_tag, multiple=True)
    channel.close()
    channel = channel.connection.channel()
    method, _, body = channel.basic_get(queue, auto_ack=True)
    equal((body, method.redelivered, method.message_count), (b"3", False, 0))
    channel.queue_delete(queue)


@check
def what_was_not_acked_returns_in_order_when_the_channel_closes(url):
    channel = channel_of(url)
    queue = unique("queue")
    channel.queue_declare(queue)
    sent = [b"1", b"2", b"3", b"4"]
    for body in sent:
        channel.basic_publish("", queue, body)
    for _ in range(3):
        channel.basic_get(queue)
    channel.close()
    channel = channel.connection.channel()
    found = [channel.basic_get(queue, auto_ack=True) for _ in sent]
    equal([body for _, _, body in found], sent)
    equal([method.redelivered for method, _, _ in found], [True, True, True, False])
    channel.queue_delete(queue)


@check
def what_was_not_acked_returns_when_the_connection_breaks(url):
    connection = connect(url)
    channel = connection.channel()
    queue = unique("queue")
    channel.queue_declare(queue)
    channel.basic_publish("", queue, b"x")
    channel.basic_get(queue)
    # No orderly close: the socket just ends.
    connection._impl._transport._sock.shutdown(socket.SHUT_RDWR)
    channel = channel_of(url)
    pump(channel, lambda: waiting(channel, queue) == 1)
    method, _, _ = channel.basic_get(queue, auto_ack=True)
    equal(method.redelivered, True)
    channel.queue_delete(queue)


@check
def nack_with_requeue_puts_back_and_without_drops(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    for body in (b"1", b"2", b"3"):
        channel.basic_publish("", queue, body)
    tags = [channel.basic_get(queue)[0].delivery_tag for _ in range(3)]
    channel.basic_nack(tags[1], multiple=True, requeue=True)
    channel.basic_reject(tags[2], requeue=False)
    found = [channel.basic_get(queue, auto_ack=True) for _ in range(3)]
    equal([(body, method and method.redelivered) for method, _, body in found], [(b"1", True), (b"2", True), (None, None)])


@check
def reject_with_requeue_puts_back(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_publish("", queue, b"1")
    method, _, _ = channel.basic_get(queue)
    equal(method.redelivered, False)
    channel.basic_reject(method.delivery_tag, requeue=True)
    method, _, body = channel.basic_get(queue, auto_ack=True)
    equal((method.redelivered, body), (True, b"1"))


@check
def prefetch_bounds_what_is_unacked(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_qos(prefetch_count=3)
    seen = []
    channel.basic_consume(queue, lambda _c, method, _p, _b: seen.append(method.delivery_tag))
    for _ in range(10):
        channel.basic_publish("", queue, b"x")
    pump(channel, lambda: len(seen) >= 3)
    equal(waiting(channel, queue), 7)
    equal(seen, [1, 2, 3])
    channel.basic_ack(2, multiple=True)
    pump(channel, lambda: len(seen) >= 5)
    channel.basic_publish("", queue, b"x")
    equal(waiting(channel, queue), 6)
    equal(seen, [1, 2, 3, 4, 5])


@check
def a_consumer_without_acks_ignores_prefetch(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_qos(prefetch_count=1)
    for number in range(5):
        channel.basic_publish("", queue, str(number).encode())
    equal(len(bodies(channel, queue, 5)), 5)


@check
def what_is_requeued_returns_to_its_place(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    for number in range(5):
        channel.basic_publish("", queue, str(number).encode())
    tags = [channel.basic_get(queue)[0].delivery_tag for _ in range(4)]
    for tag in (tags[2], tags[0]):
        channel.basic_nack(tag)
    channel.basic_ack(tags[1])
    found = [channel.basic_get(queue, auto_ack=True) for _ in range(3)]
    equal([(body, method.redelivered) for method, _, body in found], [(b"0", True), (b"2", True), (b"4", False)])
    # The one that is left is still unacked; recover puts it back.
    channel.basic_recover(requeue=True)
    equal(bodies(channel, queue, 1), [b"3"])


@check
def a_prefetch_for_the_channel_is_shared_by_its_consumers(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_qos(prefetch_count=2, global_qos=True)
    seen = []
    for _ in range(2):
        channel.basic_consume(queue, lambda _c, method, _p, _b: seen.append(method.delivery_tag))
    for _ in range(6):
        channel.basic_publish("", queue, b"x")
    pump(channel, lambda: len(seen) == 2)
    equal(waiting(channel, queue), 4)
    channel.basic_ack(1)
    pump(channel, lambda: len(seen) == 3)
    equal(waiting(channel, queue), 3)


@check
def a_reply_finds_its_asker_without_a_queue(url):
    """RabbitMQ's direct reply-to."""
    asker, answerer = channel_of(url), channel_of(url)
    pseudo = "amq.rabbitmq.reply-to"
    answers = []
    asker.basic_consume(pseudo, lambda _c, _m, properties, body: answers.append((properties.correlation_id, body)), auto_ack=True)
    queue = unique("questions")
    answerer.queue_declare(queue, auto_delete=True)
    asker.basic_publish("", queue, b"?", pika.BasicProperties(reply_to=pseudo, correlation_id="7"))
    _, properties, _ = answerer.basic_get(queue, auto_ack=True)
    equal(properties.reply_to.startswith(pseudo + "."), True)
    answerer.basic_publish("", properties.reply_to, b"!", pika.BasicProperties(correlation_id=properties.correlation_id))
    pump(asker, lambda: answers)
    equal(answers, [("7", b"!")])
    answerer.queue_delete(queue)
    text = "PRECONDITION_FAILED - reply consumer cannot acknowledge"
    answerer = closes_channel(answerer, 406, text, lambda c: c.basic_consume(pseudo, lambda *_: None))
    text = "PRECONDITION_FAILED - fast reply consumer does not exist"
    closes_channel(answerer, 406, text, lambda c: c.basic_publish("", queue, b"?", pika.BasicProperties(reply_to=pseudo)))


# ---- confirms and returns ----


@check
def a_confirmed_publish_has_arrived(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    for number in range(100):
        channel.basic_publish("", queue, str(number).encode(), mandatory=True)
    equal(waiting(channel, queue), 100)


@check
def an_unroutable_mandatory_message_comes_back(url):
    channel = channel_of(url)
    key = unique("nowhere")
    try:
        channel.basic_publish("amq.direct", key, b"lost?", pika.BasicProperties(message_id="7"), mandatory=True)
    except UnroutableError as unroutable:
        [message] = unroutable.messages
        method = message.method
        equal((method.reply_code, method.reply_text, method.exchange, method.routing_key), (312, "NO_ROUTE", "amq.direct", key))
        equal((message.properties.message_id, message.body), ("7", b"lost?"))
    except NackError as nacked:
        raise AssertionError("nacked instead of returned") from nacked
    else:
        raise AssertionError("the message vanished")
    # Without mandatory it is dropped, and confirmed all the same.
    channel.basic_publish("amq.direct", key, b"dropped")


# ---- dead letters and delays ----


@check
def a_rejected_message_goes_to_the_dead_letter_exchange_with_its_history(url):
    channel = channel_of(url)
    dead = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(dead, "amq.direct", dead)
    arguments = {"x-dead-letter-exchange": "amq.direct", "x-dead-letter-routing-key": dead}
    queue = channel.queue_declare("", exclusive=True, arguments=arguments).method.queue
    channel.basic_publish("", queue, b"bad", pika.BasicProperties(headers={"mine": 1}, correlation_id="c"))
    method, _, _ = channel.basic_get(queue)
    channel.basic_reject(method.delivery_tag, requeue=False)
    [(method, properties, body)] = [next(channel.consume(dead, auto_ack=True, inactivity_timeout=30))]
    equal((body, method.redelivered, properties.correlation_id, properties.headers["mine"]), (b"bad", False, "c", 1))
    [death] = properties.headers["x-death"]
    found = {name: death[name] for name in ("count", "reason", "queue", "exchange", "routing-keys")}
    equal(found, {"count": 1, "reason": "rejected", "queue": queue, "exchange": "", "routing-keys": [queue]})
    equal(properties.headers["x-first-death-reason"], "rejected")


@check
def a_queue_with_a_ttl_is_a_delay(url):
    """Two steps, each a queue that holds a message for a while and hands it on: what a ladder of delays is made of."""
    channel = channel_of(url)
    end = channel.queue_declare("", exclusive=True).method.queue
    second = channel.queue_declare(
        "", exclusive=True, arguments={"x-message-ttl": 100, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": end}
    ).method.queue
    first = channel.queue_declare(
        "", exclusive=True, arguments={"x-message-ttl": 200, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": second}
    ).method.queue
    begin = time.monotonic()
    for body in (b"1", b"2", b"3"):
        channel.basic_publish("", first, body)
    equal(bodies(channel, end, 3), [b"1", b"2", b"3"])
    if time.monotonic() - begin < 0.3:
        raise AssertionError("handed on before its time")


@check
def deaths_of_the_same_kind_are_counted(url):
    channel = channel_of(url)
    dead = channel.queue_declare("", exclusive=True).method.queue
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    queue = channel.queue_declare("", exclusive=True, arguments=arguments).method.queue
    headers = {}
    for expiration in ("50", "20"):
        channel.basic_publish("", queue, b"x", pika.BasicProperties(headers=headers, expiration=expiration))
        _, properties, _ = next(channel.consume(dead, auto_ack=True, inactivity_timeout=30))
        channel.cancel()
        headers = properties.headers
    [death] = headers["x-death"]
    equal((death["count"], death["reason"], death["queue"], death["original-expiration"]), (2, "expired", queue, "50"))
    # Or it would expire again where it is now.
    equal(properties.expiration, None)


@check
def an_exchange_feeds_another(url):
    channel = channel_of(url)
    upper, lower = unique("upper"), unique("lower")
    for exchange in (upper, lower):
        channel.exchange_declare(exchange, "topic", auto_delete=True)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, lower, "*.b")
    channel.exchange_bind(lower, upper, "a.#")
    for key in ("a.b", "a.c", "x.b"):
        channel.basic_publish(upper, key, key.encode())
    equal(bodies(channel, queue, 1), [b"a.b"])
    equal(waiting(channel, queue), 0)


# ---- errors ----


@check
def a_missing_queue_or_exchange_is_404(url):
    channel = channel_of(url)
    name = unique("never")
    no_queue, no_exchange = f"NOT_FOUND - no queue '{name}' in vhost '/'", f"NOT_FOUND - no exchange '{name}' in vhost '/'"
    queue = channel.queue_declare("", exclusive=True).method.queue
    for text, action in (
        (no_queue, lambda c: c.queue_declare(name, passive=True)),
        (no_queue, lambda c: c.basic_consume(name, lambda *_: None)),
        (no_queue, lambda c: c.basic_get(name)),
        (no_queue, lambda c: c.queue_purge(name)),
        (no_queue, lambda c: c.queue_bind(name, "amq.direct", "k")),
        (no_exchange, lambda c: c.queue_bind(queue, name, "k")),
        (no_exchange, lambda c: c.exchange_declare(name, passive=True)),
        (no_exchange, lambda c: c.basic_publish(name, "k", b"x")),
    ):
        channel = closes_channel(channel, 404, text, action)


@check
def other_settings_are_406(url):
    channel = channel_of(url)
    queue, exchange = unique("queue"), unique("exchange")
    channel.queue_declare(queue, auto_delete=True, arguments={"x-expires": 600000})
    channel.exchange_declare(exchange, "direct", auto_delete=True)
    for text, action in (
        (
            f"PRECONDITION_FAILED - inequivalent arg 'durable' for queue '{queue}' in vhost '/': received 'true' but current is 'false'",
            lambda c: c.queue_declare(queue, durable=True, auto_delete=True, arguments={"x-expires": 600000}),
        ),
        (
            f"PRECONDITION_FAILED - inequivalent arg 'type' for exchange '{exchange}' in vhost '/': received 'topic' but current is 'direct'",
            lambda c: c.exchange_declare(exchange, "topic", auto_delete=True),
        ),
        (
            f"PRECONDITION_FAILED - inequivalent arg 'durable' for exchange '{exchange}' in vhost '/'",
            lambda c: c.exchange_declare(exchange, "direct", auto_delete=True, durable=True),
        ),
    ):
        channel = closes_channel(channel, 406, text, action)
    channel.exchange_delete(exchange)
    channel.queue_delete(queue)


@check
def other_arguments_are_406(url):
    channel = channel_of(url)
    queue = unique("queue")
    settings = {"x-message-ttl": 60000, "x-dead-letter-exchange": "dx"}
    channel.queue_declare(queue, auto_delete=True, arguments=settings)
    of = f"for queue '{queue}' in vhost '/': "
    for arguments, text in (
        (settings | {"x-message-ttl": 60001}, f"'x-message-ttl' {of}received '60001' but current is '60000'"),
        (settings | {"x-message-ttl": "a"}, f"'x-message-ttl' {of}received 'a' but current is '60000'"),
        (settings | {"x-dead-letter-exchange": "dy"}, f"'x-dead-letter-exchange' {of}received 'dy' but current is 'dx'"),
        (settings | {"x-max-length": 3}, f"'x-max-length' {of}received the value '3' of type 'signedint' but current is none"),
        ({}, f"'x-message-ttl' {of}received none but current is the value '60000' of type 'signedint'"),
    ):
        text = f"PRECONDITION_FAILED - inequivalent arg {text}"
        channel = closes_channel(channel, 406, text, lambda c: c.queue_declare(queue, auto_delete=True, arguments=arguments))
    channel.queue_delete(queue)


@check
def bad_arguments_are_406(url):
    channel = channel_of(url)
    name = unique("queue")
    for key, value, text in (
        ("x-message-ttl", -1, "{value_negative,-1}"),
        ("x-message-ttl", "a", '"expected integer, got longstr"'),
        ("x-message-ttl", 2**40, "{value_too_large,1099511627776}"),
        ("x-expires", 0, "{value_zero,0}"),
        ("x-max-priority", 256, "{max_value_exceeded,256}"),
        ("x-max-length", -3, "{value_negative,-3}"),
        ("x-max-length-bytes", True, '"expected integer, got bool"'),
        ("x-overflow", "zzz", "invalid_overflow"),
        ("x-dead-letter-routing-key", "a", "routing_key_but_no_dlx_defined"),
        ("x-single-active-consumer", 1, "{unacceptable_type,signedint}"),
    ):
        text = f"PRECONDITION_FAILED - invalid arg '{key}' for queue '{name}' in vhost '/': {text}"
        channel = closes_channel(channel, 406, text, lambda c: c.queue_declare(name, arguments={key: value}))


@check
def messages_that_make_no_sense_are_406(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    for properties, text in (
        ({"expiration": "abc"}, "invalid expiration 'abc': no_integer"),
        ({"expiration": "-5"}, "invalid expiration '-5': {value_negative,-5}"),
        ({"expiration": "5x"}, "invalid expiration '5x': {leftover_string,\"x\"}"),
        ({"user_id": "mallory"}, "user_id property set to 'mallory' but authenticated user was 'guest'"),
    ):
        text = f"PRECONDITION_FAILED - {text}"
        channel = closes_channel(channel, 406, text, lambda c: c.basic_publish("", queue, b"x", pika.BasicProperties(**properties)))
    text = "PRECONDITION_FAILED - cannot switch from confirm to tx mode"
    channel.confirm_delivery()
    closes_channel(channel, 406, text, lambda c: c.tx_select())


@check
def an_exclusive_queue_is_locked_for_others(url):
    owner, other = channel_of(url), channel_of(url)
    queue = owner.queue_declare("", exclusive=True).method.queue
    text = f"RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{queue}' in vhost '/'"
    for action in (
        lambda c: c.queue_declare(queue, passive=True),
        lambda c: c.basic_consume(queue, lambda *_: None),
        lambda c: c.basic_get(queue),
        lambda c: c.queue_bind(queue, "amq.direct", "k"),
        lambda c: c.queue_purge(queue),
        lambda c: c.queue_delete(queue),
    ):
        other = closes_channel(other, 405, text, action)
    # Sending to it is nobody's privilege.
    other.confirm_delivery()
    other.basic_publish("", queue, b"x", mandatory=True)
    equal(bodies(owner, queue, 1), [b"x"])


@check
def what_no_broker_does_closes_the_connection(url):
    def immediately(channel):
        publish = pika.spec.Basic.Publish(exchange="", routing_key="k", immediate=True)
        channel._impl._send_method(publish, (pika.BasicProperties(), b""))

    for text, action in (
        ("NOT_IMPLEMENTED - immediate=true", immediately),
        ("NOT_IMPLEMENTED - active=false", lambda c: c.flow(False)),
        ("NOT_IMPLEMENTED - prefetch_size!=0 (100)", lambda c: c.basic_qos(prefetch_size=100)),
    ):
        closes_connection(channel_of(url), 540, text, action)


@check
def an_unknown_delivery_tag_is_406(url):
    channel = channel_of(url)
    channel = closes_channel(channel, 406, "PRECONDITION_FAILED - unknown delivery tag 99", lambda c: c.basic_ack(99))
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_publish("", queue, b"x")

    def ack_twice(channel):
        method, _, _ = channel.basic_get(queue)
        channel.basic_ack(method.delivery_tag)
        channel.basic_ack(method.delivery_tag)

    closes_channel(channel, 406, "PRECONDITION_FAILED - unknown delivery tag 1", ack_twice)


@check
def what_is_the_brokers_own_is_403(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    inside = unique("internal")
    channel.exchange_declare(inside, "fanout", internal=True)
    default = "ACCESS_REFUSED - operation not permitted on the default exchange"
    system = "ACCESS_REFUSED - deletion of system exchange 'amq.direct' in vhost '/' not allowed"
    internal = f"ACCESS_REFUSED - cannot publish to internal exchange '{inside}' in vhost '/'"
    for text, action in (
        ("ACCESS_REFUSED - queue name 'amq.mine' contains reserved prefix 'amq.*'", lambda c: c.queue_declare("amq.mine")),
        ("ACCESS_REFUSED - exchange name 'amq.mine' contains reserved prefix 'amq.*'", lambda c: c.exchange_declare("amq.mine", "direct")),
        (default, lambda c: c.queue_bind(queue, "", "k")),
        (default, lambda c: c.exchange_delete("")),
        (system, lambda c: c.exchange_delete("amq.direct")),
        (internal, lambda c: c.basic_publish(inside, "k", b"x")),
    ):
        channel = closes_channel(channel, 403, text, action)
    channel.exchange_delete(inside)


@check
def a_transaction_publishes_and_acks_with_its_commit(url):
    channel = connect(url).channel()
    other = connect(url).channel()
    queue = unique("queue")
    channel.queue_declare(queue)
    channel.tx_select()
    for body in (b"1", b"2"):
        channel.basic_publish("", queue, body)
    equal(waiting(other, queue), 0)
    channel.tx_commit()
    equal(waiting(other, queue), 2)
    channel.basic_publish("", queue, b"3")
    channel.tx_rollback()
    channel.tx_commit()
    equal(waiting(other, queue), 2)

    method, _properties, body = channel.basic_get(queue)
    equal(body, b"1")
    channel.basic_ack(method.delivery_tag)
    channel.tx_rollback()
    # Unsettled again, under its old tag.
    channel.basic_ack(method.delivery_tag)
    channel.tx_commit()
    method, _properties, body = channel.basic_get(queue)
    equal(body, b"2")
    channel.basic_reject(method.delivery_tag, requeue=True)
    equal(waiting(other, queue), 0)
    channel.tx_commit()
    equal(waiting(other, queue), 1)
    method, _properties, body = channel.basic_get(queue)
    equal((body, method.redelivered), (b"2", True))
    channel.basic_ack(method.delivery_tag)
    channel.close()
    equal(waiting(other, queue), 1)
    other.queue_delete(queue)


@check
def a_commit_returns_what_no_queue_takes(url):
    channel = connect(url).channel()
    returned = []
    channel.add_on_return_callback(lambda _channel, method, _properties, body: returned.append((method.reply_code, body)))
    channel.tx_select()
    channel.basic_publish("", unique("nowhere"), b"x", mandatory=True)
    channel.queue_declare("", exclusive=True)
    equal(returned, [])
    channel.tx_commit()
    channel.connection.process_data_events(time_limit=0)
    equal(returned, [(312, b"x")])


@check
def a_channel_has_transactions_or_confirms(url):
    channel = connect(url).channel()
    text = "PRECONDITION_FAILED - channel is not transactional"
    channel = closes_channel(channel, 406, text, lambda c: c.tx_commit())
    channel.tx_select()
    text = "PRECONDITION_FAILED - cannot switch from tx to confirm mode"
    channel = closes_channel(channel, 406, text, lambda c: c.confirm_delivery())
    channel.confirm_delivery()
    text = "PRECONDITION_FAILED - cannot switch from confirm to tx mode"
    closes_channel(channel, 406, text, lambda c: c.tx_select())


@check
def a_tag_acked_in_a_transaction_is_unknown_from_then_on(url):
    channel = connect(url).channel()
    channel.tx_select()
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_publish("", queue, b"x")
    channel.tx_commit()
    tag = channel.basic_get(queue)[0].delivery_tag

    def ack_twice(channel):
        channel.basic_ack(tag)
        channel.basic_ack(tag)

    closes_channel(channel, 406, "PRECONDITION_FAILED - unknown delivery tag 1", ack_twice)


@check
def an_exclusive_consumer_keeps_others_out(url):
    channel = channel_of(url)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.basic_consume(queue, lambda *_: None, exclusive=True)
    other = channel.connection.channel()
    text = f"ACCESS_REFUSED - queue '{queue}' in vhost '/' in exclusive use"
    closes_channel(other, 403, text, lambda c: c.basic_consume(queue, lambda *_: None))


@check
def deleting_what_is_in_use_is_406(url):
    channel = channel_of(url)
    queue = unique("queue")
    channel.queue_declare(queue)
    channel.basic_publish("", queue, b"x")
    text = f"PRECONDITION_FAILED - queue '{queue}' in vhost '/' not empty"
    channel = closes_channel(channel, 406, text, lambda c: c.queue_delete(queue, if_empty=True))
    consuming = channel.connection.channel()
    consuming.basic_consume(queue, lambda *_: None)
    text = f"PRECONDITION_FAILED - queue '{queue}' in vhost '/' in use"
    channel = closes_channel(channel, 406, text, lambda c: c.queue_delete(queue, if_unused=True))
    channel.queue_delete(queue)


@check
def an_unknown_exchange_type_closes_the_connection(url):
    text = "COMMAND_INVALID - unknown exchange type 'zzz'"
    closes_connection(channel_of(url), 503, text, lambda c: c.exchange_declare(unique("odd"), "zzz"))


@check
def a_consumer_tag_used_twice_closes_the_connection(url):
    def consume_twice(channel):
        queue = channel.queue_declare("", exclusive=True).method.queue
        frame = pika.spec.Basic.Consume(queue=queue, consumer_tag="twice", nowait=True)
        for _ in range(2):
            channel._impl._send_method(frame)

    text = "NOT_ALLOWED - attempt to reuse consumer tag 'twice'"
    closes_connection(channel_of(url), 530, text, consume_twice)


if __name__ == "__main__":
    main()
