//! The conformance suite of the delivery queues: what each of them does, run against every implementation on
//! its real server. `cases` holds the behaviours, `failings` those that earlier designs got wrong, by name;
//! the rest is particular to one implementation.

#![allow(clippy::unwrap_used, missing_docs)]

mod cases;
mod failings;
mod fixture;
mod hostile;
mod jetstream_only;
mod packs;

use self::fixture::Kind;

macro_rules! on_every_queue {
    (cases: $($case:ident),* ; failings: $($failing:ident),* $(,)?) => {
        on_every_queue! { @on jetstream JetStream, $($case),* ; $($failing),* }
        on_every_queue! { @on jetstream_packed JetStreamPacked, $($case),* ; $($failing),* }
        on_every_queue! { @on postgres Postgres, $($case),* ; $($failing),* }
        on_every_queue! { @on memory Memory, $($case),* ; $($failing),* }
    };
    (@on $queue:ident $kind:ident, $($case:ident),* ; $($failing:ident),*) => {
        mod $queue {
            $(#[tokio::test] async fn $case() { super::cases::$case(super::Kind::$kind).await })*
            mod failing {
                $(#[tokio::test]
                async fn $failing() { super::super::failings::$failing(super::super::Kind::$kind).await })*
            }
        }
    };
}

on_every_queue! {
    cases:
        comes_out_as_it_was_put_in,
        comes_out_in_the_order_of_its_connection,
        is_put_in_once_however_often_it_is_tried,
        what_a_dead_worker_held_comes_again,
        what_is_postponed_comes_again_with_what_it_has_behind_it,
        what_is_put_back_comes_again_as_it_was,
        a_hold_that_is_extended_lasts,
        a_waiting_pull_gets_what_is_enqueued_meanwhile,
        a_later_turn_goes_in_beside_what_was_finished,
        the_depth_counts_what_is_held_and_what_waits,
        it_knows_what_it_holds,
        what_has_a_lane_of_its_own_is_found_in_it_and_in_no_other,
        what_is_moved_to_another_lane_is_in_that_one_alone;
    failings:
        falsy_payload_lost,
        nak_hot_loop,
        naks_fill_the_window,
        poison_message_blocks,
        second_worker_takes_live_work,
        more_claimed_than_asked,
        late_result_overwrites,
        retry_after_costs_attempts,
        idempotency_look_ups_race
}
