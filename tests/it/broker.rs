//! Foreign clients against the broker under test.
//!
//! The checks are Python, because they are the clients' own idioms; each is a test here, and a check that no test names
//! is found by the script's list.

use std::process::Command;

use rig::{Broker, Process, script};

macro_rules! checks {
    ($module:ident = $script:literal: $($(#[$attribute:meta])* $check:ident,)+) => {
        mod $module {
            $(
                $(#[$attribute])*
                #[test]
                fn $check() {
                    super::run($script, stringify!($check));
                }
            )+

            #[test]
            fn every_check_of_the_script_is_a_test() {
                assert_eq!(super::listed($script), [$(stringify!($check)),+]);
            }
        }
    };
}

fn run(name: &str, check: &str) {
    let broker = Broker::under_test();
    Process::spawn(script(name).args([&broker.url(), check]))
        .ended()
        .expect_code(0);
}

#[test]
fn an_embedded_broker_ends_with_who_started_it() {
    let script = concat!(env!("CARGO_BIN_EXE_embedded-broker"), " | head -n 1");
    let mut shell = Command::new("sh");
    let ended = Process::spawn(shell.args(["-c", script])).ended();
    assert!(ended.stdout.starts_with("listening on 127.0.0.1:"));
}

fn listed(name: &str) -> Vec<String> {
    let list: &mut Command = &mut script(name);
    let ended = Process::spawn(list.arg("--list")).ended().expect_code(0);
    ended.stdout.lines().map(str::to_owned).collect()
}

checks! { pika = "pika_checks.py":
    connects_and_closes,
    tells_its_capabilities,
    refuses_a_wrong_password,
    refuses_an_unknown_vhost,
    many_channels_work_side_by_side,
    a_closed_channel_number_can_be_opened_again,
    heartbeats_keep_an_idle_connection_open,
    the_default_exchange_routes_by_queue_name,
    a_direct_exchange_routes_by_equal_keys,
    a_fanout_exchange_copies_to_every_queue,
    a_topic_exchange_matches_words,
    two_matching_bindings_deliver_once,
    an_unbound_queue_gets_no_more,
    a_headers_exchange_matches_headers,
    an_alternate_exchange_takes_what_found_no_queue,
    copies_go_to_further_keys_and_the_blind_ones_are_not_shown,
    a_queue_tells_its_counts,
    a_server_named_queue_gets_a_name_of_its_own,
    an_exclusive_queue_is_gone_with_its_connection,
    an_auto_delete_queue_is_gone_with_its_last_consumer,
    declaring_again_with_equal_settings_changes_nothing,
    deleting_what_is_not_there_is_fine,
    removing_a_binding_that_is_not_there_is_fine,
    an_empty_queue_name_means_the_one_declared_last,
    a_full_queue_drops_its_oldest_or_refuses_the_newest,
    a_priority_queue_delivers_the_highest_first,
    a_queue_nobody_uses_expires,
    properties_and_headers_come_back_as_sent,
    bodies_of_every_size_arrive_whole,
    a_queue_is_first_in_first_out,
    consumers_of_a_queue_take_turns,
    a_cancelled_consumer_gets_no_more,
    deleting_a_queue_tells_its_consumers,
    an_acked_message_is_gone,
    what_was_not_acked_returns_in_order_when_the_channel_closes,
    what_was_not_acked_returns_when_the_connection_breaks,
    nack_with_requeue_puts_back_and_without_drops,
    reject_with_requeue_puts_back,
    prefetch_bounds_what_is_unacked,
    a_consumer_without_acks_ignores_prefetch,
    what_is_requeued_returns_to_its_place,
    a_prefetch_for_the_channel_is_shared_by_its_consumers,
    a_reply_finds_its_asker_without_a_queue,
    a_confirmed_publish_has_arrived,
    an_unroutable_mandatory_message_comes_back,
    a_rejected_message_goes_to_the_dead_letter_exchange_with_its_history,
    a_queue_with_a_ttl_is_a_delay,
    deaths_of_the_same_kind_are_counted,
    an_exchange_feeds_another,
    a_missing_queue_or_exchange_is_404,
    other_settings_are_406,
    other_arguments_are_406,
    bad_arguments_are_406,
    messages_that_make_no_sense_are_406,
    an_exclusive_queue_is_locked_for_others,
    what_no_broker_does_closes_the_connection,
    an_unknown_delivery_tag_is_406,
    what_is_the_brokers_own_is_403,
    a_transaction_publishes_and_acks_with_its_commit,
    a_commit_returns_what_no_queue_takes,
    a_channel_has_transactions_or_confirms,
    a_tag_acked_in_a_transaction_is_unknown_from_then_on,
    an_exclusive_consumer_keeps_others_out,
    deleting_what_is_in_use_is_406,
    an_unknown_exchange_type_closes_the_connection,
    a_consumer_tag_used_twice_closes_the_connection,
}

checks! { kombu = "kombu_checks.py":
    a_task_travels_as_celery_sends_it,
    a_broadcast_reaches_every_mailbox,
    events_go_by_topic,
    a_requeued_message_is_marked_redelivered,
    confirmed_publishes_are_confirmed,
    a_simple_queue_puts_and_gets,
    a_queue_with_other_arguments_is_refused,
    heartbeats_are_exchanged,
}

checks! { celery = "celery_checks.py":
    tasks_travel_there_and_back,
    a_task_is_tried_again,
    an_error_is_told,
    remote_control_answers,
}
