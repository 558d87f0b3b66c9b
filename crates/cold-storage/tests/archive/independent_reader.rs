//! DuckDB reads what is archived, without the manifests.

use cold_storage::{Batch, EVENTS, RECEIPTS};
use serde_json::{Value, json};

use crate::support::*;

async fn filled() -> Store {
    let store = Store::files().await;
    let mut batch = Batch::new();
    for day in 10..12 {
        for number in 1..=5 {
            let whose = organization(number % 2);
            batch.push(&EVENTS, event(whose, noon(day), number)).unwrap();
            batch.push(&RECEIPTS, receipt(whose, noon(day), i64::try_from(number).unwrap())).unwrap();
        }
    }
    for (dataset, row) in others(organization(1), noon(10)) {
        batch.push(dataset, row).unwrap();
    }
    let written = batch.write(&store.cold, stream(1, 23), "writer-1", noon(12)).await.unwrap();
    written.confirm(&store.cold).await.unwrap().commit(&store.cold).await.unwrap();
    store
}

fn ask(store: &Store, sql: &[&str]) -> Vec<Vec<Value>> {
    let root = store.folder.as_ref().unwrap().path().display().to_string();
    let sql: Vec<String> = sql.iter().map(|sql| sql.replace("archive/", &format!("{root}/"))).collect();
    let sql: Vec<&str> = sql.iter().map(String::as_str).collect();
    devkit::independent::parquet(&sql).unwrap()
}

#[tokio::test]
async fn partitions_types_and_values_are_what_others_expect() {
    let store = filled().await;
    let table = |domain: &str| {
        format!("read_parquet('archive/domain={domain}/**/*.parquet', hive_partitioning = true)")
    };
    let all = "read_parquet('archive/domain=*/**/*.parquet', hive_partitioning = true, union_by_name = true)";
    let mut questions = vec![format!(
        "SELECT domain, org, date, count(*) AS rows FROM {all} WHERE domain IN ('events', 'receipts', 'audit') \
         GROUP BY ALL ORDER BY ALL"
    )];
    for domain in ["receipts", "audit", "events", "occurrences", "messages"] {
        questions.push(format!("DESCRIBE SELECT * FROM {}", table(domain)));
        questions.push(format!("SELECT * FROM {} ORDER BY ALL LIMIT 1", table(domain)));
    }
    let questions: Vec<&str> = questions.iter().map(String::as_str).collect();
    let answers = ask(&store, &questions);
    let (zero, one) = (organization(0).to_string(), organization(1).to_string());
    let count =
        |domain, org: &str, date, rows| json!({"domain": domain, "org": org, "date": date, "rows": rows});
    assert_eq!(
        answers[0],
        [
            count("audit", "_", "2026-11-10", 1),
            count("events", &zero, "2026-11-10", 2),
            count("events", &zero, "2026-11-11", 2),
            count("events", &one, "2026-11-10", 3),
            count("events", &one, "2026-11-11", 3),
            count("receipts", &zero, "2026-11-10", 2),
            count("receipts", &zero, "2026-11-11", 2),
            count("receipts", &one, "2026-11-10", 3),
            count("receipts", &one, "2026-11-11", 3),
        ]
    );
    let types = |answer: &[Value]| -> Vec<String> {
        let described =
            answer.iter().map(|row| format!("{} {}", text(row, "column_name"), text(row, "column_type")));
        described
            .filter(|column| !["date", "domain", "org"].contains(&column.split(' ').next().unwrap()))
            .collect()
    };
    assert_eq!(
        types(&answers[1]),
        [
            "delivery UUID",
            "attempt INTEGER",
            "turn BIGINT",
            "event UUID",
            "organization UUID",
            "subscription UUID",
            "connection UUID",
            "outcome VARCHAR",
            "status INTEGER",
            "error VARCHAR",
            "at TIMESTAMP WITH TIME ZONE",
            "duration_ms INTEGER",
        ]
    );
    let receipt = &answers[2][0];
    assert_eq!(text(receipt, "delivery"), "00000000-0000-0001-0000-000000000001");
    assert_eq!((&receipt["status"], &receipt["turn"]), (&json!(503), &json!(1)));
    assert_eq!(text(receipt, "at"), "2026-11-10 12:00:00+00:00");

    let audit = &answers[4][0];
    assert_eq!((&audit["before"], text(audit, "after")), (&json!(null), r#"{"name":"Acme"}"#));
    assert!(types(&answers[3]).contains(&"after JSON".to_owned()));

    assert!(types(&answers[5]).contains(&"body BLOB".to_owned()));
    let event = &answers[6][0];
    assert_eq!(text(event, "uid"), uid(noon(10), 1).to_string());
    assert_eq!(text(event, "body"), "7b22736563726574223a317d");
    assert_eq!((text(event, "subscriptions"), &event["expunged_at"]), ("[]", &json!(null)));

    assert!(types(&answers[7]).contains(&"manual BOOLEAN".to_owned()));
    let occurrence = &answers[8][0];
    assert_eq!((&occurrence["manual"], &occurrence["ticks"]), (&json!(false), &json!(60)));

    let message = &answers[10][0];
    assert_eq!((text(message, "payload"), text(message, "org")), ("00ff7061796c6f6164", "_"));
    assert_eq!(text(message, "headers"), r#"{"Nats-Msg-Id":["1"]}"#);
}

fn text<'a>(row: &'a Value, column: &str) -> &'a str {
    row[column].as_str().unwrap_or_else(|| panic!("{column} of {row}"))
}

/// The examples of `docs/archive.md` find something.
#[tokio::test]
async fn the_documented_queries_work() {
    let store = filled().await;
    let page = include_str!("../../../../docs/archive.md");
    let examples: Vec<&str> =
        page.split("```sql\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(examples.len() >= 3);
    // Identifiers that an example needs are those of the first event.
    let event = uid(noon(10), 1).to_string();
    let examples: Vec<String> = examples
        .iter()
        .map(|sql| {
            sql.replace("019f0e7c-0000-7000-8000-000000000001", &event)
                .replace("01900000-0000-7000-8000-000000000001", &organization(1).to_string())
        })
        .collect();
    let examples: Vec<&str> = examples.iter().map(String::as_str).collect();
    for (sql, rows) in examples.iter().zip(ask(&store, &examples)) {
        assert!(!rows.is_empty(), "{sql}");
    }
}
