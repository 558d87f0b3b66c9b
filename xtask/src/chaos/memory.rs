//! How much memory the processes use, and when the machine itself stood still: what times out then is nobody's fault.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use devkit::{process::resident_memory, stack::Stack};
use jiff::SignedDuration;
use tokio::{task::JoinHandle, time::sleep};

use super::ledger::{Entry, Ledger, Phase, now};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A look that comes so much later: the machine has no time for those that ask.
const STARVED: Duration = Duration::from_millis(500);
/// Numbers the times in which that was so; faults that were made have small ones.
const STARVATION: usize = usize::MAX;

/// Looks once a second how much memory each process has in use.
#[derive(Debug)]
pub(super) struct Watch {
    processes: Arc<Mutex<BTreeMap<String, u32>>>,
    most: Arc<Mutex<BTreeMap<String, u64>>>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Begins with the processes that there are.
    pub(super) fn start(stack: &mut Stack, ledger: Ledger) -> Self {
        let (processes, most) =
            (Arc::<Mutex<BTreeMap<String, u32>>>::default(), Arc::<Mutex<BTreeMap<String, u64>>>::default());
        let (watched, noted) = (Arc::clone(&processes), Arc::clone(&most));
        let task = tokio::spawn(async move {
            loop {
                let running = watched.lock().unwrap_or_else(PoisonError::into_inner).clone();
                for (name, pid) in running {
                    // One that was just killed has none.
                    let bytes = resident_memory(pid).unwrap_or_default();
                    let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
                    let most = noted.entry(name).or_default();
                    *most = (*most).max(bytes);
                }
                let asleep = Instant::now();
                sleep(LOOK).await;
                if asleep.elapsed() > LOOK + STARVED {
                    let entry = |phase| Entry::Fault {
                        number: STARVATION,
                        kind: "starved".to_owned(),
                        target: "the machine".to_owned(),
                        phase,
                        aftermath_s: Some(15),
                    };
                    let length = SignedDuration::try_from(asleep.elapsed()).unwrap_or(SignedDuration::MAX);
                    ledger.write_at(now() - length, entry(Phase::Begins));
                    ledger.write(entry(Phase::Over));
                }
            }
        });
        let mut watch = Self { processes, most, task };
        watch.follow(stack);
        watch
    }

    /// Processes get new numbers when they are started again.
    pub(super) fn follow(&mut self, stack: &mut Stack) {
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        for process in stack.processes() {
            if let Some(id) = process.id() {
                processes.insert(process.name().to_owned(), id.pid);
            }
        }
    }

    /// Writes down the most of each.
    pub(super) fn finish(self, ledger: &Ledger) {
        self.task.abort();
        let most = std::mem::take(&mut *self.most.lock().unwrap_or_else(PoisonError::into_inner));
        for (process, bytes) in most {
            ledger.write(Entry::Memory { process, bytes });
        }
    }
}
