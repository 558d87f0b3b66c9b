//! How much memory the processes use.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use devkit::{process::resident_memory, stack::Stack};
use tokio::{task::JoinHandle, time::sleep};

use super::ledger::{Entry, Ledger};

/// Looks once a second how much memory each process has in use.
#[derive(Debug)]
pub(super) struct Watch {
    processes: Arc<Mutex<BTreeMap<String, u32>>>,
    most: Arc<Mutex<BTreeMap<String, u64>>>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Begins with the processes that there are.
    pub(super) fn start(stack: &mut Stack) -> Self {
        let (processes, most) =
            (Arc::<Mutex<BTreeMap<String, u32>>>::default(), Arc::<Mutex<BTreeMap<String, u64>>>::default());
        let (watched, noted) = (Arc::clone(&processes), Arc::clone(&most));
        let task = tokio::spawn(async move {
            loop {
                let now = watched.lock().unwrap_or_else(PoisonError::into_inner).clone();
                for (name, pid) in now {
                    // One that was just killed has none.
                    let bytes = resident_memory(pid).unwrap_or_default();
                    let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
                    let most = noted.entry(name).or_default();
                    *most = (*most).max(bytes);
                }
                sleep(Duration::from_secs(1)).await;
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
    pub(super) async fn finish(self, ledger: &Ledger) {
        self.task.abort();
        let most = std::mem::take(&mut *self.most.lock().unwrap_or_else(PoisonError::into_inner));
        for (process, bytes) in most {
            ledger.write(Entry::Memory { process, bytes });
        }
    }
}
