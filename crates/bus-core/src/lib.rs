//! The domain of the event bus and the seams along which it may change: events, subscriptions and
//! their matching, the delivery queue, the stores, and the shell that every binary runs in.

pub mod address;
pub mod answer;
pub mod audit;
pub mod clock;
pub mod cloudevent;
pub mod config;
pub mod connection;
pub mod delivery;
pub mod fanout;
pub mod fault;
pub mod filter;
pub mod ids;
pub mod launcher;
pub mod lifecycle;
pub mod matcher;
pub mod nats;
pub mod notify;
pub mod pattern;
pub mod peers;
pub mod pg;
pub mod queue;
pub mod receipt;
pub mod reconcile;
pub mod retry;
pub mod schedule;
pub mod signature;
pub mod sink;
pub mod snapshots;
pub mod streams;
pub mod subscription;
pub mod supervise;
pub mod telemetry;
pub mod webhook_rules;
mod words;
