use super::control::Control;
use std::sync::Arc;
#[derive(Clone)]
pub struct Bus {
    control: Arc<Control>,
}
impl Bus {
    pub(crate) fn control(&self) -> &Arc<Control> {
        &self.control
    }
}
