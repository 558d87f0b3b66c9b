//! The bus as its real processes.

#![allow(clippy::unwrap_used, missing_docs)]

mod audit_full;
mod cancel;
mod cluster;
mod erasures;
mod hints;
mod history;
mod i10_back_pressure;
mod i1_crash;
mod i1_reconcile;
mod i2_matching;
mod i4_accounting;
mod i4_outage;
mod i5_clock;
mod i6_happy_path;
mod i7_lanes;
mod i7_neighbours;
mod i8_archive;
mod independent;
mod launcher;
mod main_job;
mod sample_configs;
mod semantics;
mod switch_backend;
