//! The plan on a real server.

use async_nats::jetstream::stream::Config;
use bus_core::{
    clock::{Clock as _, SystemClock},
    config::Common,
    nats::Nats,
    streams::{Change, Effect, Field, Loss, Plan, StreamsError, apply, existing, plan},
};
use devkit::servers::shared_servers;
use metrics_exporter_prometheus::PrometheusBuilder;

use super::configured;

/// A deployment of its own on the shared server, which its streams leave with [`Deployment::end`].
struct Deployment {
    prefix: String,
    url: String,
}

impl Deployment {
    async fn new() -> Self {
        let url = shared_servers().await.unwrap().nats_url().to_owned();
        Self { prefix: devkit::random_token(6), url }
    }

    fn common(&self, variables: &[(&str, &str)]) -> Common {
        let ours = [("NATS_URL", self.url.as_str()), ("EVENT_BUS_PREFIX", self.prefix.as_str())];
        configured(&[&ours, variables].concat())
    }

    /// A connection of somebody with this configuration.
    async fn with(&self, variables: &[(&str, &str)]) -> Nats {
        let nats = Nats::connect(&self.common(variables), "test").await.unwrap();
        nats.wait_for_server().await.unwrap();
        nats
    }

    fn stream(&self, name: &str) -> String {
        format!("{}_{name}", self.prefix.to_uppercase())
    }

    async fn end(self) {
        let nats = self.with(&[]).await;
        for stream in existing(&nats, SystemClock.now()).await.unwrap() {
            nats.jetstream.delete_stream(&stream.config.name).await.unwrap();
        }
    }
}

async fn planned(nats: &Nats) -> Plan {
    plan(&existing(nats, SystemClock.now()).await.unwrap(), &nats.streams)
}

async fn applied(nats: &Nats, loss: Loss) -> Result<(), StreamsError> {
    apply(nats, &planned(nats).await, loss, SystemClock.now()).await
}

async fn publish(nats: &Nats, subject: &str) {
    let subject = format!("{}.{subject}", nats.names.prefix);
    nats.jetstream.publish(subject, "x".into()).await.unwrap().await.unwrap();
}

async fn on_server(nats: &Nats, stream: &str) -> (Config, u64) {
    let info = nats.jetstream.get_stream(stream).await.unwrap().cached_info().clone();
    (info.config, info.state.messages)
}

#[tokio::test]
async fn what_is_applied_needs_nothing_more() {
    let deployment = Deployment::new().await;
    let nats = deployment.with(&[]).await;
    let first = planned(&nats).await;
    assert_eq!(first.changes.len(), nats.streams.len());
    apply(&nats, &first, Loss::Refused, SystemClock.now()).await.unwrap();
    let second = planned(&nats).await;
    assert!(second.changes.is_empty() && second.not_described.is_empty(), "{second:?}");
    applied(&nats, Loss::Refused).await.unwrap();
    deployment.end().await;
}

#[tokio::test]
async fn a_process_creates_what_the_bus_needs_and_changes_nothing_that_exists() {
    let deployment = Deployment::new().await;
    deployment.with(&[("EVENT_BUS_STREAMS__DEAD__MAX_BYTES", "5000000")]).await.prepare().await.unwrap();
    let nats = deployment.with(&[]).await;
    nats.prepare().await.unwrap();
    let mut names: Vec<_> = existing(&nats, SystemClock.now())
        .await
        .unwrap()
        .into_iter()
        .map(|stream| stream.config.name)
        .collect();
    names.sort();
    assert_eq!(names, ["AUDIT", "DEAD", "DELIVER"].map(|name| deployment.stream(name)));
    assert_eq!(on_server(&nats, &nats.names.dead_stream).await.0.max_bytes, 5_000_000);
    deployment.end().await;
}

#[tokio::test]
async fn the_archiver_creates_what_is_archived() {
    let deployment = Deployment::new().await;
    let nats = deployment.with(&[("EVENT_BUS_STREAMS__API__ARCHIVE", "archive")]).await;
    nats.prepare_archived().await.unwrap();
    let mut names: Vec<_> = existing(&nats, SystemClock.now())
        .await
        .unwrap()
        .into_iter()
        .map(|stream| stream.config.name)
        .collect();
    names.sort();
    assert_eq!(names, ["API", "AUDIT"].map(|name| deployment.stream(name)));
    deployment.end().await;
}

/// Each is done only by whoever accepts the loss, and then the server has it.
#[tokio::test]
async fn what_loses_data_is_refused_unless_it_is_accepted() {
    let deployment = Deployment::new().await;
    let api = deployment.stream("API");
    for (field, settings) in [
        ("max_messages", &[("EVENT_BUS_STREAMS__API__MAX_MESSAGES", "2")][..]),
        ("max_bytes", &[("EVENT_BUS_STREAMS__API__MAX_BYTES", "100")]),
        ("subjects", &[("EVENT_BUS_STREAMS__API__SUBJECTS", r#"["events.api.v2.>"]"#)]),
        (
            "retention",
            &[("EVENT_BUS_STREAMS__API__RETENTION", "interest"), ("EVENT_BUS_STREAMS__API__DISCARD", "old")],
        ),
    ] {
        let before = deployment.with(&[]).await;
        applied(&before, Loss::Refused).await.unwrap();
        for _ in 0..3 {
            publish(&before, "events.api.v1").await;
        }
        let after = deployment.with(settings).await;
        let refused = applied(&after, Loss::Refused).await.unwrap_err();
        assert!(matches!(refused, StreamsError::LosesData(_)), "{refused:?}");
        assert!(refused.to_string().contains(field), "{refused}");
        let (config, messages) = on_server(&after, &api).await;
        assert_eq!((config.max_messages, messages), (-1, 3), "{field}: nothing was changed");
        applied(&after, Loss::Accepted).await.unwrap();
        assert!(planned(&after).await.changes.is_empty(), "{field}");
        before.jetstream.delete_stream(&api).await.unwrap();
    }
    deployment.end().await;
}

#[tokio::test]
async fn a_stream_that_is_no_longer_archived_may_lose_what_is_not_copied() {
    let deployment = Deployment::new().await;
    let archived = deployment.with(&[]).await;
    applied(&archived, Loss::Refused).await.unwrap();
    let dropped = deployment.with(&[("EVENT_BUS_STREAMS__AUDIT__ARCHIVE", "drop")]).await;
    let refused = applied(&dropped, Loss::Refused).await.unwrap_err().to_string();
    assert!(refused.contains("archive: \"archive\" → \"drop\""), "{refused}");
    applied(&dropped, Loss::Accepted).await.unwrap();
    assert!(planned(&dropped).await.changes.is_empty());
    // Back again nothing is lost.
    applied(&archived, Loss::Refused).await.unwrap();
    deployment.end().await;
}

#[tokio::test]
async fn what_the_server_cannot_do_is_refused_whoever_asks_for_it() {
    let deployment = Deployment::new().await;
    applied(&deployment.with(&[]).await, Loss::Refused).await.unwrap();
    for settings in [
        &[("EVENT_BUS_STREAMS__API__STORAGE", "memory")][..],
        &[("EVENT_BUS_STREAMS__API__RETENTION", "workqueue"), ("EVENT_BUS_STREAMS__API__DISCARD", "old")],
    ] {
        let nats = deployment.with(settings).await;
        let refused = applied(&nats, Loss::Accepted).await.unwrap_err();
        assert!(matches!(refused, StreamsError::Impossible(_)), "{refused:?}");
        // It is the server's rule, not only ours.
        let change = planned(&nats).await.changes.remove(0);
        nats.jetstream.update_stream(&change.config).await.unwrap_err();
    }
    deployment.end().await;
}

#[tokio::test]
async fn a_limit_that_nothing_exceeds_loses_nothing() {
    let deployment = Deployment::new().await;
    let before = deployment.with(&[]).await;
    applied(&before, Loss::Refused).await.unwrap();
    publish(&before, "events.api.v1").await;
    let after = deployment
        .with(&[
            ("EVENT_BUS_STREAMS__API__MAX_MESSAGES", "1"),
            ("EVENT_BUS_STREAMS__API__MAX_BYTES", "1000"),
            ("EVENT_BUS_STREAMS__API__MAX_AGE_S", "3600"),
        ])
        .await;
    let plan = planned(&after).await;
    let fields: Vec<&Field> = plan.changes.iter().flat_map(Change::fields).collect();
    assert_eq!(fields.len(), 3);
    assert!(fields.iter().all(|field| field.effect == Effect::Harmless), "{fields:?}");
    applied(&after, Loss::Refused).await.unwrap();
    let (config, messages) = on_server(&after, &deployment.stream("API")).await;
    assert_eq!((config.max_messages, config.max_bytes, messages), (1, 1_000, 1));
    deployment.end().await;
}

#[tokio::test]
async fn a_domain_that_is_added_to_the_configuration_catches_its_subjects() {
    let deployment = Deployment::new().await;
    applied(&deployment.with(&[]).await, Loss::Refused).await.unwrap();
    let nats = deployment
        .with(&[
            ("EVENT_BUS_STREAMS__BILLING__SUBJECTS", r#"["billing.>"]"#),
            ("EVENT_BUS_STREAMS__BILLING__MAX_AGE_S", "3600"),
            ("EVENT_BUS_STREAMS__BILLING__MAX_BYTES", "1000000"),
        ])
        .await;
    applied(&nats, Loss::Refused).await.unwrap();
    publish(&nats, "billing.invoice.paid").await;
    assert_eq!(on_server(&nats, &deployment.stream("BILLING")).await.1, 1);
    // Whoever does not know of it leaves it alone.
    let others = planned(&deployment.with(&[]).await).await;
    assert!(others.changes.is_empty());
    assert_eq!(others.not_described, [deployment.stream("BILLING")]);
    deployment.end().await;
}

#[tokio::test]
async fn a_process_says_which_streams_are_not_as_configured() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    // This test runs on one thread.
    let _guard = metrics::set_default_local_recorder(&recorder);
    let drift = |stream| {
        let line = format!("bus_stream_drift{{stream=\"{stream}\"}} ");
        let page = metrics.render();
        page.lines().find_map(|found| found.strip_prefix(&line)).map(str::to_owned)
    };
    let deployment = Deployment::new().await;
    deployment.with(&[]).await.prepare().await.unwrap();
    assert_eq!((drift("deliver").as_deref(), drift("dead").as_deref()), (Some("0"), Some("0")));
    let nats = deployment.with(&[("EVENT_BUS_STREAMS__DEAD__MAX_AGE_S", "3600")]).await;
    nats.prepare().await.unwrap();
    assert_eq!((drift("deliver").as_deref(), drift("dead").as_deref()), (Some("0"), Some("1")));
    applied(&nats, Loss::Refused).await.unwrap();
    nats.prepare().await.unwrap();
    assert_eq!(drift("dead").as_deref(), Some("0"));
    deployment.end().await;
}
