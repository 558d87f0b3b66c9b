//! The API, over a real publisher and a real database.

#![allow(clippy::unwrap_used, missing_docs)]

mod api_acks;
mod api_audit;
mod api_audit_reads;
mod api_cancel;
mod api_connections;
mod api_dead_letters;
mod api_document;
mod api_erasures;
mod api_events;
mod api_isolation;
mod api_keys;
mod api_limits;
mod api_occurrences;
mod api_problems;
mod api_replays;
mod api_rules;
mod api_scheduled_events;
mod api_schedules;
mod api_subscriptions;
mod common;
